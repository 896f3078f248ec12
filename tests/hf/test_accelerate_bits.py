"""accelerate with 8 and 4 bits: plans over codes, saved and loaded, and what is left alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import mixtura
from hf.decoders import MODELS, WIDE, decoded, generated, left, own, report
from mixtura.core.errors import NotExpressibleError, OptionError, UnknownNameError
from mixtura.hf.accelerate import acceleration
from mixtura.hf.quantizer import MixturaQuantizationConfig, quantize_model
from mixtura.nn.experts.quantized import QuantizedExperts
from mixtura.nn.quantized_linear import QuantizedLinear
from pico import pico, tokens


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_a_plan_over_codes_computes_what_the_modules_do(make, bits):
    model = quantize_model(make(), bits=bits, linears=True, activation_bits=16)
    ids, mask = tokens(3, 12), left(3, 12, 1)
    expected = decoded(model, ids, mask)
    mixtura.accelerate(model)
    seen = decoded(model, ids, mask)
    assert (seen - expected).norm() < 2e-3 * expected.norm()
    assert report(model) == {"planned": 10, "refusal": "", "through_modules": {}}


@pytest.mark.parametrize(("bits", "off"), [(8, 0.02), (4, 0.3)])
def test_few_bits_are_near_all_bits(bits, off):
    model = own()
    ids, mask = tokens(3, 12), left(3, 12, 0)
    expected = decoded(model, ids, mask)
    seen = decoded(mixtura.accelerate(model, bits=bits), ids, mask)
    assert acceleration(model)["planned"] == 10
    assert (seen - expected).norm() < off * expected.norm()


def test_saved_and_loaded_to_the_bit(tmp_path):
    model = mixtura.accelerate(own(), bits=4, group_size=64)
    text = generated(model)
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.quantization_config.linears
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    for (name, seen), known in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(seen, known), name
    assert not [name for name, tensor in loaded.named_parameters() if tensor.requires_grad and "scale" in name]
    assert torch.equal(generated(mixtura.accelerate(loaded)), text)


def test_loaded_from_all_bits(tmp_path):
    own().save_pretrained(tmp_path)
    config = MixturaQuantizationConfig(bits=8, linears=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    quantized = quantize_model(own(), bits=8, linears=True)
    for (name, seen), known in zip(loaded.state_dict().items(), quantized.state_dict().values(), strict=True):
        assert torch.equal(seen, known), name


def test_routers_and_a_tied_head_keep_their_bits():
    model = mixtura.accelerate(pico("qwen2", **WIDE, tie_word_embeddings=True), bits=8)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sparse = mixtura.accelerate(MODELS["native-qwen2_moe"](), bits=8)
    block = sparse.model.layers[0].mlp
    assert isinstance(block.experts, QuantizedExperts)
    assert isinstance(block.shared_expert.up_proj, QuantizedLinear)
    assert type(block.shared_expert_gate) is torch.nn.Linear
    assert block.gate.weight.dtype == torch.float32
    assert isinstance(sparse.lm_head, QuantizedLinear)


def test_wrong_options_change_nothing():
    model = own()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for error, options in (
        (OptionError, {"bits": 5}),
        (OptionError, {"group_size": 32}),
        (UnknownNameError, {"bits": 8, "groups": 32}),
        (OptionError, {"bits": 8, "linears": "all"}),
    ):
        with pytest.raises(error):
            mixtura.accelerate(model, **options)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    mixtura.accelerate(model, bits=8)
    with pytest.raises(NotExpressibleError, match="quantized already"):
        mixtura.accelerate(model, bits=4)
    assert acceleration(model)["refusal"] == ""


def tied():
    return pico("qwen2", **WIDE, tie_word_embeddings=True)


def test_a_tied_head_gets_a_matrix_of_its_own_if_asked_for(tmp_path):
    model, table = tied(), tied().model.embed_tokens.weight
    ids = tokens(3, 12)
    expected = decoded(model, ids, left(3, 12, 0))
    mixtura.accelerate(model, bits=8, head=True)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert (model.lm_head.dequantized() - table).norm() < 0.01 * table.norm()
    seen = decoded(model, ids, left(3, 12, 0))
    assert acceleration(model)["planned"] == 10
    assert 0 < (seen - expected).norm() < 0.02 * expected.norm()
    text = generated(model)
    model.save_pretrained(tmp_path / "memory")
    tied().save_pretrained(tmp_path / "all")
    config = MixturaQuantizationConfig(bits=8, linears=True, head=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "all", quantization_config=config).save_pretrained(tmp_path / "few")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("memory", "few")]
    assert files[0] == files[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "few").eval()
    assert isinstance(loaded.lm_head, QuantizedLinear)
    assert loaded.config.tie_word_embeddings is False
    assert loaded.model.embed_tokens.weight.is_floating_point()
    assert not loaded.lm_head.weight_scale.requires_grad
    assert torch.equal(generated(mixtura.accelerate(loaded)), text)


def test_a_head_of_its_own_stays_so_with_all_bits_again():
    model, ids = quantize_model(tied(), bits=8, linears=True, head=True), tokens()
    with torch.no_grad():
        few = model(ids).logits
        back = model.dequantize()
        assert back.lm_head.weight.is_floating_point()
        assert not torch.equal(back.lm_head.weight, back.model.embed_tokens.weight)
        torch.testing.assert_close(back(ids).logits, few, rtol=1e-3, atol=1e-3)


def test_head_is_for_tied_heads_of_linears_that_are_quantized():
    with pytest.raises(OptionError, match="head=True needs linears=True"):
        MixturaQuantizationConfig(head=True)
    with pytest.raises(OptionError, match="head must be True or False, got 'yes'"):
        MixturaQuantizationConfig(linears=True, head="yes")
    untied = [quantize_model(pico("qwen2", **WIDE), linears=True, head=head) for head in (True, False)]
    for (name, seen), known in zip(untied[0].state_dict().items(), untied[1].state_dict().values(), strict=True):
        assert torch.equal(seen, known), name
