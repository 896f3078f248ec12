"""A stock family holds the model exactly, is read without mixtura, and what it cannot hold is named."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtura.core import MixturaError, MixturaWarning, NotExpressibleError, OptionError
from mixtura.hf import convert
from mixtura.hf import export as module
from mixtura.hf.export import check_export, export
from mixtura.nn import ExpertGroup, Experts, Mixture
from mixtura.nn.experts.forms import ZeroExperts
from mixtura.nn.mixture import FeedForward
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.surgery.upcycle import upcycle
from pico import COMMON, pico, tokens

D, LAYERS = 32, COMMON["num_hidden_layers"]
READ = """
import json, sys
sys.modules["mixtura"] = None  # importing it raises
import torch
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    kept = torch.load(folder + ".pt", weights_only=True)
    difference = float((model(kept["tokens"]).logits - kept["logits"]).abs().max())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    missing = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    found[folder.rsplit("/", 1)[1]] = [model.config.model_type, difference, tied, missing]
print(json.dumps(found))
"""


def mixture(k=2, renormalize=1.0, experts=4, width=16, shared=None, **options):
    return Mixture(TopKRouter(D, experts, k, renormalize=renormalize, **options), Experts(experts, D, width), shared)


def some(**options):
    """Mixtures in the last layers of a model of three."""
    return {i: mixture(**options) for i in (1, 2)}


def every(**options):
    return {i: mixture(**options) for i in range(LAYERS)}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 77.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
CASES = {
    "llama": ("llama", {}, some, "qwen2_moe"),
    "llama-shared": ("llama", {}, lambda: {1: mixture(renormalize=None, shared=FeedForward(D, 8))}, "qwen2_moe"),
    "llama-every": ("llama", {}, every, "mixtral"),
    "llama-every-undivided": ("llama", {}, lambda: every(renormalize=None), "qwen2_moe"),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, some, "qwen2_moe"),
    "llama-rope-scaled": ("llama", {"rope_parameters": LLAMA3}, some, "qwen2_moe"),
    "llama-eps": ("llama", {"rms_norm_eps": 1e-2, "head_dim": 16}, some, "qwen2_moe"),
    "mistral": ("mistral", {"sliding_window": None}, some, "qwen2_moe"),
    "mistral-window": ("mistral", {"sliding_window": 3}, some, "qwen2_moe"),
    "mistral-window-every": ("mistral", {"sliding_window": 3}, every, "mixtral"),
    "qwen2": ("qwen2", {}, lambda: some(k=3), "qwen2_moe"),
    "qwen2-windows": ("qwen2", QWEN_WINDOWS, some, "qwen2_moe"),
    "qwen3": ("qwen3", {}, some, "qwen3_moe"),
    "qwen3-biases": ("qwen3", {"attention_bias": True}, some, "qwen3_moe"),
    "qwen3-window": ("qwen3", {**QWEN_WINDOWS, "max_window_layers": 0}, some, "qwen3_moe"),
    "olmoe": ("olmoe", {"clip_qkv": 0.05}, every, "olmoe"),
    "mixtral": ("mixtral", {"head_dim": 16}, every, "mixtral"),
}


def spread(model):
    """Weights with which every part shows in the logits; biases too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """All cases written, and what one process that cannot import mixtura found in the folders."""
    root = tmp_path_factory.mktemp("exports")
    receipts = {}
    for name, (base, options, layers, _) in CASES.items():
        model = spread(convert(pico(base, **options), layers()))
        receipts[name] = export(model, root / name)
        torch.save({"tokens": tokens(), "logits": model(tokens()).logits.detach()}, root / f"{name}.pt")
    command = [sys.executable, "-c", READ, *(str(root / name) for name in CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return receipts, json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_exported_is_read_without_mixtura(exported, name):
    receipts, found = exported
    family, difference, tied, missing = found[name]
    assert family == receipts[name]["family"] == CASES[name][3]
    assert max(difference, receipts[name]["max_logit_difference"]) <= 1e-6
    assert tied == CASES[name][1].get("tie_word_embeddings", False)
    assert missing == []


@pytest.mark.parametrize("name", ["llama-rope-scaled", "llama-eps", "mistral-window", "qwen2-windows", "olmoe"])
def test_what_is_carried_over_shows_in_the_logits(name):
    """Or the comparison above would prove nothing."""
    base, options, layers, _ = CASES[name]
    with_options = spread(convert(pico(base, **options), layers()))
    without = convert(pico(base, **({"sliding_window": None} if base == "mistral" else {})), layers())
    if name != "llama-eps":
        without.load_state_dict(with_options.state_dict())
    assert (with_options(tokens()).logits - spread(without)(tokens()).logits).abs().max() > 1e-3


def test_shards_of_an_upcycled_model_are_chosen_alike(tmp_path):
    """Rows of a copy are tied; stock top-k names no order among equals, but takes the same set."""
    model = spread(pico("llama"))
    dense = model(tokens(8, 64)).logits
    model = upcycle(model, layers="last:2", copies=5, shards=3, k=6).model
    export(model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(stock(tokens(8, 64)).logits, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_compared_in_float32(dtype, tmp_path):
    """All experts are chosen, so no near tie can fall differently."""
    model = convert(pico("llama"), some(k=4)).to(dtype)
    receipt = export(model, tmp_path / "out")
    assert receipt["max_logit_difference"] <= 1e-6
    assert receipt["max_logit_difference_in_dtype"] >= 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == model.dtype == dtype


def test_near_ties_that_fall_differently_in_half_precision_are_told(tmp_path):
    dense = spread(pico("llama")).to(torch.bfloat16)
    model = upcycle(dense, layers="all", copies=16, shards=2, k=2).model  # shards of two copies, if their logits tie
    with pytest.warns(MixturaWarning, match="some tokens go to other experts than here, logits differ by up to"):
        receipt = export(model, tmp_path / "out")
    assert receipt["max_logit_difference"] <= 1e-6 < receipt["max_logit_difference_in_dtype"]


def test_the_model_stays_as_it_is(tmp_path):
    model = convert(pico("llama"), {1: mixture(shared=FeedForward(D, 8))}).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "out")
    assert model.training
    assert model.config.model_type == "mixtura"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_written_over_or_when_logits_differ(tmp_path, monkeypatch):
    model = convert(pico("llama"), some())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").touch()
    with pytest.raises(OptionError, match="must be a new or empty folder"):
        export(model, tmp_path / "there")
    monkeypatch.setattr(module, "_windows", lambda config: {"use_sliding_window": True, "sliding_window": 2})
    with pytest.raises(MixturaError, match=r"logits differ by .* nothing was written"):
        export(spread(model), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def with_zero():
    return Mixture(TopKRouter(D, 5), ExpertGroup([Experts(4, D, 16), ZeroExperts(1, D)]))


def of(router=None, **options):
    """A mixture whose experts have other options."""
    return Mixture(router or TopKRouter(D, 4), Experts(4, D, 16, **options))


@pytest.mark.parametrize(
    ("base", "options", "layers", "reason"),
    [
        ("llama", {}, lambda: {0: with_zero()}, "layer 0: experts of several"),
        ("llama", {}, lambda: {0: of(TopKRouter(D, 4, bias=True))}, "another gate"),
        ("llama", {}, lambda: {0: mixture(score="sigmoid")}, "selection with score sigmoid"),
        ("llama", {}, lambda: {0: mixture(order="topk-score")}, "selection with order topk-score"),
        ("llama", {}, lambda: {0: mixture(scale=2.0)}, r"selection with scale 2\.0"),
        ("llama", {}, lambda: {0: mixture(weight_on="input")}, "selection with weight_on input"),
        ("llama", {}, lambda: {0: mixture(renormalize=2.0)}, r"renormalize 2\.0, it has None or 1\.0"),
        ("llama", {}, lambda: {0: of(bias=True)}, "with biases"),
        ("llama", {}, lambda: {0: of(gated=False)}, "without a gate"),
        ("llama", {}, lambda: {0: of(activation="gelu")}, "activation gelu beside silu"),
        ("llama", {}, lambda: {0: mixture(), 1: mixture(experts=5)}, "mixtures of different sizes"),
        ("llama", {}, lambda: {0: mixture(shared=FeedForward(D, 8, bias=True))}, "a shared expert of another form"),
        ("llama", {"attention_bias": True}, some, "biases in attention: qkvo"),
        ("llama", {"mlp_bias": True}, some, "biases in the feed-forward"),
        ("qwen3", QWEN_WINDOWS, some, "sliding-window attention in some of the layers"),
        ("qwen3", {}, lambda: {0: mixture(shared=FeedForward(D, 8))}, "qwen3_moe: layer 0: a shared expert"),
        ("olmoe", {}, some, "olmoe: layers that are no mixtures of ours: 0"),
        ("gpt2", {}, lambda: {0: mixture()}, "not of gpt2"),
    ],
)
def test_what_no_family_can_hold_is_named(base, options, layers, reason, tmp_path):
    model = convert(pico(base, **options), layers())
    assert all(check_export(model).values())
    with pytest.raises(NotExpressibleError, match=reason):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_mixtures_is_refused(tmp_path):
    with pytest.raises(NotExpressibleError, match="has no mixtures"):
        export(pico("llama"), tmp_path / "out")


def test_a_synonym_of_an_activation_is_the_same(tmp_path):
    model = convert(pico("llama", hidden_act="swish"), some())
    assert check_export(model)["qwen2_moe"] == ""
