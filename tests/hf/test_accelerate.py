"""Decode steps as a plan: what the modules compute, in generation of every kind, or the modules themselves."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

import mixtura
from hf.decoders import MODELS, WIDE, decoded, generated, left, own, report
from mixtura.core.errors import MixturaWarning, NotExpressibleError, OptionError
from mixtura.hf.accelerate import acceleration, undo
from mixtura.hf.growing_cache import GrowingLayer, grow
from mixtura.nn import Mixture
from mixtura.nn.backends.native.library import instructions, use_instructions
from mixtura.nn.backends.native.tape import read_bandwidth
from mixtura.traces.capture import capture
from pico import pico, tokens
from pico_native import native

REFUSED = {
    "gpt2": ("parts that a plan does not know: \\['transformer'\\]", {"n_embd": 64}),
    "vaultgemma": ("layer 0: VaultGemmaDecoderLayer has the parts", {}),
    "olmo": ("OlmoLayerNorm is no normalization that a plan knows", {}),
    "ministral3": ("a plan does not know what llama_4_scaling_beta of its positions mean", {}),
    "exaone4": ("layer 2 has a window of 5, its cache one of 0", {"sliding_window": 5, "sliding_window_pattern": 3}),
    "native-hy_v4": ("its cache, a DynamicIndexedLayer, is not one", {}),
    "phi": ("parts that a plan does not know", {}),
    "llama": ("multiple of 16 units, got 8", {"head_dim": 8}),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_a_plan_computes_what_the_modules_do(make):
    model = make()
    ids, mask = tokens(3, 12), left(3, 12, 1)
    expected, text = decoded(model, ids, mask), generated(model)
    assert mixtura.accelerate(model) is model
    seen = decoded(model, ids, mask)
    assert (seen - expected)[:, :].abs().max() < 1e-4
    assert torch.equal(generated(model), text)
    assert report(model) == {"planned": 15, "refusal": "", "through_modules": {}}


@pytest.mark.parametrize(("family", "reason", "options"), [(n, *row) for n, row in REFUSED.items()], ids=list(REFUSED))
def test_what_a_plan_does_not_know_goes_through_the_modules(family, reason, options):
    make = native if family.startswith("native-") else pico
    model = make(family.removeprefix("native-"), **{**WIDE, **options})
    text = generated(model)
    with pytest.warns(MixturaWarning, match=f"decode steps go through the modules: .*{reason}"):
        mixtura.accelerate(model)
    assert torch.equal(generated(model), text)
    seen = acceleration(model)
    assert seen["planned"] == 0
    assert seen["through_modules"] == {seen["refusal"]: 5}


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "top_k": 2}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["beams", "sampling", "several"],
)
def test_generation_of_every_kind_is_planned(options):
    model = own()
    torch.manual_seed(3)
    text = generated(model, **options)
    mixtura.accelerate(model)
    torch.manual_seed(3)
    assert torch.equal(generated(model, **options), text)
    assert acceleration(model)["planned"] == 5


def test_drafts_are_cropped_from_the_cache():
    model, draft = own(), pico("llama", **WIDE)
    draft.generation_config.assistant_confidence_threshold = 0
    ids = tokens(1, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    text = model.generate(ids, **options)
    mixtura.accelerate(model), mixtura.accelerate(draft)
    assert torch.equal(model.generate(ids, assistant_model=draft, **options), text)
    assert acceleration(draft)["planned"] > 0


def test_bfloat16_is_as_near_to_float32_as_the_modules_are():
    exact, half = own(), own().bfloat16()
    for mixture in (module for module in half.modules() if isinstance(module, Mixture)):
        mixture.router.float()
    ids, mask = tokens(2, 12), left(2, 12, 0)
    truth, by_modules = decoded(exact, ids, mask), decoded(half, ids, mask).float()
    mixtura.accelerate(half)
    by_plan = decoded(half, ids, mask).float()
    assert acceleration(half)["planned"] == 10
    assert (by_plan - truth).norm() < 1.1 * (by_modules - truth).norm() < 0.1 * truth.norm()


@pytest.mark.parametrize("isa", instructions()[1])
def test_every_instruction_set(isa):
    before = instructions()[0]
    model = own()
    ids, mask = tokens(2, 10), left(2, 10, 1)
    expected = decoded(model, ids, mask)
    mixtura.accelerate(model)
    use_instructions(isa)
    try:
        seen = decoded(model, ids, mask)
    finally:
        use_instructions(before)
    assert (seen - expected).abs().max() < 1e-4


def test_bits_depend_neither_on_threads_nor_on_other_rows():
    model = mixtura.accelerate(own())
    ids, mask = tokens(5, 10), left(5, 10, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = decoded(model, ids, mask)
        torch.set_num_threads(3)
        three = decoded(model, ids, mask)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)
    # the prompt goes through torch, whose bits depend on the rows: only what follows from an equal cache is compared
    whole, alone = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(ids[:, :9], past_key_values=whole)
    for layer, copied in zip(whole.layers, alone.layers, strict=True):
        copied.update(layer.keys[3:4].detach().clone(), layer.values[3:4].detach().clone())
    with torch.no_grad():
        together = model(ids[:, 9:], past_key_values=whole).logits[3]
        assert torch.equal(model(ids[3:4, 9:], past_key_values=alone).logits[0], together)


@pytest.mark.parametrize("length", [255, 1024, 1025, 2300])
def test_long_contexts_are_summed_in_chunks(length):
    model = pico("llama", **WIDE, num_hidden_layers=1, max_position_embeddings=4096)
    ids = tokens(2, length + 1)
    mask = left(2, length + 1, 300 if length > 300 else 0)
    found = []
    for make in (lambda m: m, mixtura.accelerate):
        make(model)
        cache = DynamicCache(config=model.config)
        place = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=place[:, :-1], past_key_values=cache)
            step = {"attention_mask": mask, "position_ids": place[:, -1:], "past_key_values": cache}
            found.append(model(ids[:, -1:], **step).logits)
    assert acceleration(model)["planned"] == 1
    assert (found[1] - found[0]).abs().max() < 1e-4


def steps(model):
    """Reasons of the steps of one generation that went through the modules."""
    model._mixtura_decoding.through_modules.clear()
    generated(model)
    return dict(model._mixtura_decoding.through_modules)


def test_capture_sees_what_it_did_and_says_why_it_is_slow():
    model = own()
    with capture(model) as before:
        text = generated(model)
    mixtura.accelerate(model)
    assert steps(model) == {}
    with capture(model) as after:
        assert torch.equal(generated(model), text)
    assert (after.expert == before.expert).all()
    assert acceleration(model)["through_modules"] == {"capture, replay, steering or a hook listens": 5}
    assert steps(model) == {}


def test_a_changed_model_is_not_run_by_an_old_plan():
    model = mixtura.accelerate(own())
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert steps(model) == {"a hook is on its LlamaDecoderLayer": 5}
    handle.remove()
    assert steps(model) == {}
    model.model.layers[0].self_attn.scaling *= 2
    assert steps(model) == {"its setting scaling was changed": 5}
    model.model.layers[0].self_attn.scaling /= 2
    old = model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(old.detach() * 2)
    assert steps(model) == {"its tensors were exchanged": 5}


def test_what_changes_with_the_position_is_noticed():
    model = pico("llama", **WIDE)
    attention = model.model.layers[1].self_attn

    class Scaled(type(attention)):
        def forward(self, *args, position_ids, **kwargs):
            out, weights = super().forward(*args, position_ids=position_ids, **kwargs)
            return out * (1 + (position_ids.max() > 1000)), weights

    attention.__class__ = Scaled
    with pytest.warns(MixturaWarning, match="a plan recorded from its modules computes something else"):
        mixtura.accelerate(model)


def test_weights_that_change_in_place_count():
    model = mixtura.accelerate(own())
    generated(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    fresh = own()
    fresh.load_state_dict(model.state_dict())
    ids, mask = tokens(2, 8), left(2, 8, 0)
    assert (decoded(model, ids, mask) - decoded(fresh, ids, mask)).abs().max() < 1e-4
    assert acceleration(model)["through_modules"] == {}


def test_an_adapter_is_followed():
    model = mixtura.accelerate(pico("llama", **WIDE))
    with_adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    text = generated(with_adapter)
    assert acceleration(model)["through_modules"] == {"its modules were exchanged": 5}
    per_layer = 4 + 3 + 2 + 1  # attention's and the feed-forward's projections, the adapter's, attention
    assert acceleration(model)["operations"] == 5 * (3 * per_layer + 1)
    undo(model)
    assert torch.equal(generated(with_adapter), text)


def test_steps_without_a_plan_go_by_operation():
    with pytest.warns(MixturaWarning, match="Starcoder2MLP"):
        model = mixtura.accelerate(pico("starcoder2", **WIDE))
    ids, mask = tokens(2, 12), left(2, 12, 0)
    seen = decoded(model, ids, mask)
    per_layer = 4 + 2 + 1
    assert acceleration(model)["operations"] == 10 * (3 * per_layer + 1) + 3 * 6 + 1
    assert (seen - decoded(undo(model), ids, mask)).abs().max() < 1e-5


def test_other_caches_and_outputs_go_through_the_modules():
    model = mixtura.accelerate(own())
    static = generated(model, cache_implementation="static")
    assert list(acceleration(model)["through_modules"]) == ["the cache is not one that grows in place"]
    assert torch.equal(static, generated(model))
    model._mixtura_decoding.through_modules.clear()
    out = generated(model, output_hidden_states=True, return_dict_in_generate=True)
    assert len(out.hidden_states) == 6
    assert list(acceleration(model)["through_modules"]) == ["output_hidden_states is asked for"]


def test_training_is_as_ever():
    model, plain = mixtura.accelerate(own()).train(), own().train()
    ids = tokens()
    for one in (model, plain):
        one(ids, labels=ids).loss.backward()
    for (name, seen), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(seen.grad, expected.grad, atol=1e-6), name


def test_copies_saves_and_undo(tmp_path):
    model = mixtura.accelerate(own())
    text = generated(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert torch.equal(generated(model), text)
    assert not torch.equal(generated(twin), text)
    model.save_pretrained(tmp_path)
    loaded = type(undo(model)).from_pretrained(tmp_path)
    assert type(loaded) is type(model) is type(own())
    assert torch.equal(generated(loaded), text)
    with pytest.raises(OptionError, match="was not accelerated"):
        acceleration(model)


def test_other_devices_are_refused():
    with pytest.raises(NotExpressibleError, match="on the CPU, got one on meta"):
        mixtura.accelerate(pico("llama").to("meta"))


def test_a_growing_cache_is_a_dynamic_one():
    torch.manual_seed(0)
    plain, growing = DynamicCache(), DynamicCache()
    grow(growing)
    actions = [
        *[lambda c: c.update(*torch.randn(2, 3, 2, 5, 4, generator=seed()).unbind(), 0)] * 3,
        lambda c: c.crop(-4),
        lambda c: c.reorder_cache(torch.tensor([2, 0, 0])),
        lambda c: c.update(*torch.randn(2, 3, 2, 1, 4, generator=seed()).unbind(), 0),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.update(*torch.randn(2, 6, 2, 90, 4, generator=seed()).unbind(), 0),
        lambda c: c.batch_select_indices(torch.tensor([5, 1])),
        lambda c: c.crop(-1),
        lambda c: c.update(*torch.randn(2, 2, 2, 3, 4, generator=seed()).unbind(), 0),
    ]
    for number, action in enumerate(actions):
        for cache in (plain, growing):
            seed.number = number
            action(cache)
        assert torch.equal(growing.layers[0].keys, plain.layers[0].keys), number
        assert torch.equal(growing.layers[0].values, plain.layers[0].values), number
        assert growing.get_seq_length() == plain.get_seq_length()
    assert type(growing.layers[0]) is GrowingLayer


def seed():
    return torch.Generator().manual_seed(seed.number)


def test_a_growing_cache_writes_to_no_tensor_of_others():
    plain = DynamicCache()
    plain.update(torch.ones(1, 1, 8, 4), torch.ones(1, 1, 8, 4), 0)
    theirs = plain.layers[0].keys
    grow(plain)
    plain.crop(-3)
    plain.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    assert theirs.eq(1).all()
    assert plain.layers[0].keys[0, 0, :, 0].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_states_that_need_a_gradient_are_concatenated():
    cache = DynamicCache()
    grow(cache)
    keys = torch.ones(1, 1, 2, 4, requires_grad=True)
    cache.update(keys, keys, 0)
    seen, _ = cache.update(keys * 2, keys, 0)
    seen.sum().backward()
    assert keys.grad.eq(3).all()


def test_bandwidth_is_measured():
    assert read_bandwidth(torch.ones(1 << 20)) > 1e6
