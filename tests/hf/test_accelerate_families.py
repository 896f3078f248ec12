"""Families with more in them than Llama: sinks, norms behind layers, caps, fused projections, no rotation."""

import pytest
import torch
from transformers import DynamicCache

import mixtura
from hf.decoders import FAMILIES, LONGROPE, NATIVE_FAMILIES, WIDE, decoded, generated, gpt_oss, left, report, spread
from mixtura.hf.accelerate import acceleration
from mixtura.hf.quantizer import quantize_model
from pico import pico, tokens
from pico_native import native

MODELS = {
    "gpt_oss": gpt_oss,
    **{name: lambda n=name, o=options: spread(pico(n, **WIDE, **o)) for name, options in FAMILIES.items()},
    "stablelm-parallel": lambda: spread(pico("stablelm", **WIDE, use_parallel_residual=True, use_qkv_bias=True)),
    **{f"native-{n}": lambda n=n, o=o: spread(native(n, **WIDE, **o)) for n, o in NATIVE_FAMILIES.items()},
}


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_a_plan_computes_what_the_modules_do(make):
    model = make()
    ids, mask = tokens(3, 12), left(3, 12, 1)
    expected, text = decoded(model, ids, mask), generated(model)
    mixtura.accelerate(model)
    assert (decoded(model, ids, mask) - expected).norm() < 2e-5 * expected.norm()
    assert torch.equal(generated(model), text)
    assert report(model) == {"planned": 15, "refusal": "", "through_modules": {}}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["gpt_oss", "phi3", "gemma2"])
def test_the_same_over_codes(name, bits):
    model = quantize_model(MODELS[name](), bits=bits, linears=True, activation_bits=16)
    ids, mask = tokens(3, 12), left(3, 12, 1)
    expected = decoded(model, ids, mask)
    mixtura.accelerate(model)
    assert (decoded(model, ids, mask) - expected).norm() < 2e-3 * expected.norm()
    assert acceleration(model)["through_modules"] == {}


def test_sinks_take_their_share():
    model, ids, mask = gpt_oss(), tokens(2, 12), left(2, 12, 0)
    seen = decoded(mixtura.accelerate(model), ids, mask)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-50)
    assert (decoded(model, ids, mask) - seen).norm() > 1e-2 * seen.norm()
    assert acceleration(model)["planned"] == 20


def test_norms_that_stay_in_float32():
    exact, half = native("gpt_oss", **WIDE), native("gpt_oss", **WIDE).bfloat16()
    for name, module in half.named_modules():
        if name.endswith("norm"):
            module.float()
    ids, mask = tokens(2, 12), left(2, 12, 0)
    truth, by_modules = decoded(exact, ids, mask), decoded(half, ids, mask).float()
    by_plan = decoded(mixtura.accelerate(half), ids, mask).float()
    assert acceleration(half)["planned"] == 10
    assert (by_plan - truth).norm() < 1.1 * (by_modules - truth).norm() < 0.1 * truth.norm()


def test_a_rotation_that_changes_with_the_length():
    model = spread(pico("phi3", **WIDE, rope_parameters=LONGROPE, original_max_position_embeddings=8))
    ids, mask, padded = tokens(2, 12), left(2, 12, 0), left(2, 12, 1)
    expected = [decoded(model, ids, m) for m in (mask, padded)]
    mixtura.accelerate(model)
    for m, known in zip((mask, padded), expected, strict=True):
        assert (decoded(model, ids, m) - known).norm() < 2e-5 * known.norm()
    reason = "sequences are on both sides of position 8, where the rotation changes"
    assert report(model) == {"planned": 19, "refusal": "", "through_modules": {reason: 1}}


def test_a_fused_projection_that_is_exchanged_is_noticed():
    model = mixtura.accelerate(pico("phi3", **WIDE))
    weight = model.model.layers[0].self_attn.qkv_proj.weight
    model.model.layers[0].self_attn.qkv_proj.weight = torch.nn.Parameter(weight.detach().clone())
    generated(model)
    assert list(acceleration(model)["through_modules"]) == ["its tensors were exchanged"]


def test_far_positions_are_known():
    model = mixtura.accelerate(pico("llama", **WIDE, max_position_embeddings=100_000))
    cache, plain = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        for past in (cache, plain):
            model(tokens(1, 4), past_key_values=past)
        last = {"input_ids": tokens(1, 1), "position_ids": torch.tensor([[70_000]])}
        seen = model(**last, past_key_values=cache).logits
        expected = mixtura.hf.accelerate.undo(model)(**last, past_key_values=plain).logits
    assert torch.allclose(seen, expected, atol=1e-5)
