"""The quantizer of transformers: loaded with few bits, saved, loaded again; families, options, what goes on working."""

import copy
import itertools
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from mixtura.core.errors import FileFormatError, NotExpressibleError, OptionError, UnknownNameError
from mixtura.hf import MixturaQuantizationConfig, convert, quantize_model, record
from mixtura.hf.count import count_parameters
from mixtura.hf.load import load_model
from mixtura.hf.save import save_model
from mixtura.hf.stored import compare_with_files
from mixtura.nn import ExpertGroup, Experts, Mixture
from mixtura.nn.experts.forms import CopyExperts, ZeroExperts
from mixtura.nn.experts.quantized import QuantizedExperts
from mixtura.nn.quantized_linear import QuantizedLinear
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico
from pico_native import logits, native, tokens

D = 32


def own():
    """Of the family mixtura: a mixture of forms beside a plain one."""
    forms = [Experts(3, D, 48, gated=False, bias=True, activation="gelu"), ZeroExperts(1, D), CopyExperts(1, D)]
    mixed = Mixture(TopKRouter(D, 5, 3), ExpertGroup(forms))
    return convert(pico("llama"), {0: Mixture(TopKRouter(D, 4, 2), Experts(4, D, 48)), 2: mixed})


MODELS = {
    "mixtura": own,
    **{name: lambda name=name: native(name) for name in ("olmoe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h")},
}
OPTIONS = {
    "8": {"bits": 8},
    "4": {"bits": 4},
    "4-zero-64": {"bits": 4, "zero_point": True, "group_size": 64, "scale_dtype": "float32"},
}


def quantized_experts(model):
    return [module for module in model.modules() if isinstance(module, QuantizedExperts)]


def same_tensors(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for (name, seen), known in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert seen.dtype == known.dtype, name
        assert torch.equal(seen, known), name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_loaded_with_few_bits_saved_and_loaded_again_without_a_bit_changed(make, options, tmp_path):
    model = make()
    places = {f"{n}.down_proj" for n, module in model.named_modules() if getattr(module, "has_gate", None) is not None}
    model.save_pretrained(tmp_path / "all")
    config = MixturaQuantizationConfig(**options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "all", quantization_config=config).eval()
    assert {n for n, t in loaded.named_parameters() if n.endswith("down_proj") and t.dtype == torch.uint8} == places
    loaded.save_pretrained(tmp_path / "few")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "few").eval()
    assert again.config.quantization_config.to_dict() == config.to_dict()
    same_tensors(again, loaded)
    again.save_pretrained(tmp_path / "again")
    quantize_model(model, **options).save_pretrained(tmp_path / "memory")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("few", "again", "memory")]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize(("bits", "least"), [(8, 0.9999), (4, 0.97)])
def test_logits_are_near_those_of_all_bits(make, bits, least):
    model, x = make(), tokens()
    before = logits(model, x)
    after = logits(quantize_model(model, bits=bits), x)
    assert not torch.equal(after, before)
    assert cosine_similarity(after.flatten(), before.flatten(), 0) > least


def test_the_size_on_disk_is_what_the_bits_say(tmp_path):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128}
    weights = 2 * 4 * 3 * 256 * 128  # of experts
    model = native("olmoe", **sizes)
    others = sum(p.numel() for p in model.parameters()) * 2 - weights * 2
    for bits, group_size, per_weight in ((8, 32, 8.5), (4, 32, 4.5), (4, 128, 4.125)):
        made = quantize_model(native("olmoe", **sizes).bfloat16(), bits=bits, group_size=group_size)
        made.save_pretrained(tmp_path / f"{bits}-{group_size}")
        wanted = others + weights * per_weight / 8
        assert sum(p.nbytes for p in made.parameters()) == wanted
        file = tmp_path / f"{bits}-{group_size}" / "model.safetensors"
        assert 0 <= file.stat().st_size - wanted < 20_000  # names and shapes


def test_every_expert_has_codes_of_its_own_on_disk(tmp_path):
    quantize_model(native("olmoe"), bits=4).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        codes = {name: file.get_slice(name).get_dtype() for name in file.keys() if ".experts.3." in name}  # noqa: SIM118
    parts = itertools.product((0, 1), ("down", "gate", "up"))
    assert codes == {f"model.layers.{i}.mlp.experts.3.{part}_proj.weight": "U8" for i, part in parts}
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written == MixturaQuantizationConfig(bits=4).to_dict()
    assert written["quant_method"] == "mixtura"


def test_other_types_than_that_of_the_file(tmp_path):
    native("olmoe").save_pretrained(tmp_path / "all")
    options = {"quantization_config": MixturaQuantizationConfig(bits=4), "dtype": torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "all", **options).eval()
    loaded.save_pretrained(tmp_path / "few")
    same_tensors(AutoModelForCausalLM.from_pretrained(tmp_path / "few"), loaded)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "few", dtype=torch.float32).eval()
    assert wide.lm_head.weight.dtype == torch.float32
    codes = [
        torch.equal(a.down_proj, b.down_proj) for a, b in zip(*map(quantized_experts, (wide, loaded)), strict=True)
    ]
    assert all(codes)
    assert {module.down_proj_scale.dtype for module in quantized_experts(wide)} == {torch.float16}
    assert cosine_similarity(logits(wide, tokens()).flatten(), logits(loaded, tokens()).flatten().float(), 0) > 0.999


WRONG = {
    "bits must be one of 8, 4, got 5": {"bits": 5},
    "group_size must be one of 32, 64, 128, got 16": {"group_size": 16},
    "quant_method must be 'mixtura'": {"quant_method": "gptq"},
    "linears must be True or False, got 'head'": {"linears": "head"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_one_clear_error(message):
    with pytest.raises(OptionError, match=message):
        MixturaQuantizationConfig(**WRONG[message])


def test_an_unknown_option_is_named_with_the_nearest_one(tmp_path):
    with pytest.raises(
        UnknownNameError, match="unknown option of the quantizer 'groupsize'; did you mean 'group_size'"
    ):
        MixturaQuantizationConfig(groupsize=64)
    quantize_model(native("olmoe")).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"]["bits"] = 3
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(OptionError, match="bits must be one of 8, 4, got 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_cannot_be_quantized_is_refused(tmp_path):
    with pytest.raises(NotExpressibleError, match="LlamaForCausalLM has no stacked experts to quantize"):
        quantize_model(pico("llama"))
    pico("llama").save_pretrained(tmp_path)
    with pytest.raises(NotExpressibleError, match="has no stacked experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MixturaQuantizationConfig())
    with pytest.raises(NotExpressibleError, match="the model is quantized already, by 'mixtura'"):
        quantize_model(quantize_model(native("olmoe")))


def test_weights_that_are_not_finite_stop_loading(tmp_path):
    model = native("olmoe")
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="conversion"):  # theirs; the report above it has the reason
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MixturaQuantizationConfig())
    with pytest.raises(OptionError, match="weights must be finite to be quantized"):
        quantize_model(model)


def last(model):
    return model.model.layers[-1].mlp.experts.down_proj


WEIGHTS = {  # that cannot be quantized; the last that would be
    "model.layers.1.mlp.experts.down_proj: weights must be finite": (lambda m: last(m)[3], torch.nan, {}),
    "model.layers.1.mlp.experts.down_proj: weights up to 1e+09 need scale_dtype='float32'": (
        lambda m: last(m)[3],
        1e9,
        {},
    ),
    "lm_head.weight: weights must be finite": (lambda m: m.lm_head.weight, torch.inf, {"linears": True}),
    "lm_head.weight: weights up to 3e+38 need scale": (
        lambda m: m.lm_head.weight,
        -3e38,
        {"linears": True, "scale_dtype": "float32"},
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("message", WEIGHTS)
def test_a_weight_that_cannot_be_quantized_is_named_and_leaves_the_model_as_it_was(message, tied):
    weight, value, options = WEIGHTS[message]
    model = native("olmoe", tie_word_embeddings=tied)
    with torch.no_grad():
        weight(model)[1, 2] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head = {"head": True} if tied and options else {}
    with pytest.raises(OptionError) as seen:
        quantize_model(model, bits=4, **options, **head)
    assert str(seen.value).startswith(message)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].nan_to_num(), tensor.nan_to_num()) for name, tensor in before.items())
    if value == 1e9:  # what the error advises works
        quantize_model(model, bits=4, scale_dtype="float32")


def test_configurations_that_say_nothing_of_a_tied_head():
    model, x = native("inkling_text"), tokens()
    before = logits(model, x)
    after = logits(quantize_model(model, bits=8, linears=True), x)
    assert type(model.lm_head) is QuantizedLinear
    assert cosine_similarity(after.flatten(), before.flatten(), 0) > 0.999


@pytest.mark.parametrize("make", [own, MODELS["olmoe"]], ids=["mixtura", "olmoe"])
def test_codes_that_are_missing_or_of_another_shape_stop_loading(make, tmp_path):
    quantize_model(make()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (scale, *_) = sorted(name for name in tensors if name.endswith("down_proj_scale"))
    (codes, *_) = sorted(name for name in tensors if name.endswith("0.down_proj.weight"))
    for name, tensor in ((scale, None), (scale, tensors[scale][:, :1]), (codes, tensors[codes][:, :8])):
        changed = {**tensors, name: tensor}
        changed = {key: value.contiguous() for key, value in changed.items() if value is not None}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(FileFormatError):
            load_model(tmp_path)


@pytest.mark.parametrize("name", ["mixtura", "olmoe", "gpt_oss"])
def test_pickled_and_copied(name, tmp_path):
    model, x = quantize_model(MODELS[name](), bits=4, linears=True), tokens()
    torch.save(model, tmp_path / "model.pt")
    for again in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert list(map(type, again.modules())) == list(map(type, model.modules()))
        same_tensors(again, model)
        assert torch.equal(logits(again, x), logits(model, x))
        again.bfloat16().dequantize()
        assert not quantized_experts(again)
    assert quantized_experts(model)


def test_generation_capture_and_adapters_go_on_working():
    from peft import LoraConfig, get_peft_model

    model, x = quantize_model(native("olmoe"), bits=4), tokens()
    text = model.generate(x, max_new_tokens=5, do_sample=False)
    assert text.shape == (2, 12)
    with record(model) as states, torch.no_grad():
        model(x)
    assert [entry.layer for entry in states[0].tape.records] == ["0", "1"]
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    adapted(x, labels=x).loss.backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in gradients)
    first = [g for n, g in gradients.items() if "layers.0" in n and "lora_B" in n]
    assert all(g.any() for g in first)


def test_all_bits_can_be_had_again():
    model, x = native("gpt_oss"), tokens()
    kind = type(model.model.layers[0].mlp.experts)
    quantize_model(model, bits=8)
    few = logits(model, x)
    back = model.dequantize()
    assert type(back.model.layers[0].mlp.experts) is kind
    assert not hasattr(back.config, "quantization_config")
    torch.testing.assert_close(logits(back, x), few, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("when", ["before", "after"])
def test_all_bits_are_had_again_in_the_type_that_the_model_has_by_then(when):
    model, x = native("olmoe"), tokens()  # its configuration goes on to say float32
    if when == "before":
        model.to(torch.bfloat16)
    quantize_model(model, bits=8, linears=True)
    if when == "after":
        model.to(torch.bfloat16)
    few = logits(model, x)
    back = model.dequantize()
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}
    assert cosine_similarity(logits(back, x).flatten().float(), few.flatten().float(), 0) > 0.99
    assert {
        p.dtype for p in quantize_model(back).dequantize(torch.float16).model.layers[0].mlp.experts.parameters()
    } == {torch.float16}


def test_parameters_are_counted_as_what_codes_stand_for():
    for make in (own, MODELS["olmoe"], MODELS["gpt_oss"]):
        plain = count_parameters(make())
        for options in ({"bits": 8}, {"bits": 4, "zero_point": True}):
            few = count_parameters(quantize_model(make(), **options))
            assert few[:2] == plain[:2]
            assert few.trainable < plain.trainable


def test_files_and_card_of_a_folder(tmp_path):
    for name, make in (("own", own), ("olmoe", MODELS["olmoe"])):
        model = quantize_model(make(), bits=4)
        out = save_model(model, tmp_path / name)
        stored = compare_with_files(model, out)
        assert (stored.missing, stored.unexpected, stored.mismatched, stored.differing) == ([], [], {}, [])
        first = (out / "README.md").read_text().split("---\n")[2].strip().splitlines()[0]
        assert "`import mixtura.hf`" in first
        assert "4 bits" in first
        assert "stock" not in first
