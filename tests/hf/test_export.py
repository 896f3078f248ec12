"""A stock family holds the model exactly, is read without mixtura, and what it cannot hold is named."""

import subprocess
import sys

import pytest
import torch

from mixtura.core import NotExpressibleError
from mixtura.hf import convert
from mixtura.hf.export import check_export, export
from mixtura.nn import ExpertGroup, Experts, Mixture
from mixtura.nn.experts.forms import ZeroExperts
from mixtura.nn.mixture import FeedForward
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico, tokens

D = 32
READ = """
import sys
sys.modules["mixtura"] = None  # importing it raises
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
x = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
expected = torch.load(sys.argv[2], weights_only=True)
print(model.config.model_type, float((model(x).logits - expected).abs().max()))
"""


def mixture(k=2, renormalize=1.0, experts=4, width=16, shared=None):
    return Mixture(TopKRouter(D, experts, k, renormalize=renormalize), Experts(experts, D, width), shared)


@pytest.mark.parametrize(
    ("base", "made", "family"),
    [
        ("llama", lambda: mixture(), "qwen2_moe"),
        ("llama", lambda: mixture(renormalize=None, shared=FeedForward(D, 8)), "qwen2_moe"),
        ("qwen2", lambda: mixture(k=3), "qwen2_moe"),
        ("mistral", lambda: mixture(), "qwen2_moe"),
        ("qwen3", lambda: mixture(), "qwen3_moe"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_exported_is_read_without_mixtura(base, made, family, tied, tmp_path):
    options = {"sliding_window": None} if base == "mistral" else {}
    model = convert(pico(base, tie_word_embeddings=tied, **options), {1: made(), 2: made()})
    receipt = export(model, tmp_path / "out")
    assert receipt["family"] == family
    assert receipt["max_logit_difference"] <= 1e-6
    torch.save(model(tokens()).logits.detach(), tmp_path / "expected.pt")
    command = [sys.executable, "-c", READ, str(tmp_path / "out"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, difference = done.stdout.split()
    assert found == family
    assert float(difference) <= 1e-6


def test_rotary_and_norms_are_carried_over(tmp_path):
    options = {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rms_norm_eps": 1e-3}
    model = convert(pico("llama", **options), {0: mixture()})
    assert export(model, tmp_path / "out")["max_logit_difference"] <= 1e-6


def with_zero():
    return Mixture(TopKRouter(D, 5), ExpertGroup([Experts(4, D, 16), ZeroExperts(1, D)]))


@pytest.mark.parametrize(
    ("base", "options", "layers", "reason"),
    [
        ("llama", {}, lambda: {0: with_zero()}, "layer 0: experts of several forms"),
        ("llama", {}, lambda: {0: Mixture(TopKRouter(D, 4, bias=True), Experts(4, D, 16))}, "another gate"),
        ("llama", {}, lambda: {0: Mixture(TopKRouter(D, 4, score="sigmoid"), Experts(4, D, 16))}, "another selection"),
        ("llama", {}, lambda: {0: Mixture(TopKRouter(D, 4), Experts(4, D, 16, bias=True))}, "with biases"),
        ("llama", {}, lambda: {0: Mixture(TopKRouter(D, 4), Experts(4, D, 16, activation="gelu"))}, "activation gelu"),
        ("llama", {}, lambda: {0: mixture(), 1: mixture(experts=5)}, "layers of different sizes"),
        ("llama", {"attention_bias": True}, lambda: {0: mixture()}, "biases in attention"),
        ("mistral", {"sliding_window": 4}, lambda: {0: mixture()}, "sliding-window"),
        ("qwen3", {}, lambda: {0: mixture(shared=FeedForward(D, 8))}, "a shared expert"),
        ("gpt2", {}, lambda: {0: mixture()}, "not of gpt2"),
    ],
)
def test_what_no_family_can_hold_is_named(base, options, layers, reason, tmp_path):
    model = convert(pico(base, **options), layers())
    assert all(check_export(model).values())
    with pytest.raises(NotExpressibleError, match=reason):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
