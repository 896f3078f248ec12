"""NLLB: what transformers 5.23 computes is wrong, a small run finds out, and a repaired version is accepted.

T tokens, D width, E experts.
"""

import pytest
import torch
from transformers.models.nllb_moe import modeling_nllb_moe as nllb

from mixtura.core.errors import FileFormatError, NotExpressibleError
from mixtura.hf import record, wrong_forward
from mixtura.hf.install import install
from mixtura.hf.load import load_model
from mixtura.traces.capture import capture

OPTIONS = {"d_model": 8, "num_experts": 4, "expert_capacity": 64, "moe_token_dropout": 0.0, "router_bias": False}
MESSAGE = "nllb-moe: this version of transformers computes its mixtures wrongly"


def shares(block, hidden_TD):
    """Weights (T, E) of the two best experts, and which is the best (T, E)."""
    probability_TE = (hidden_TD @ block.router.classifier.weight.T).softmax(-1)
    best_T2 = probability_TE.topk(2).indices
    first_TE = torch.zeros_like(probability_TE).scatter(1, best_T2[:, :1], 1.0)
    chosen_TE = torch.zeros_like(probability_TE).scatter(1, best_T2, 1.0)
    weight_TE = probability_TE * chosen_TE
    return weight_TE / weight_TE.sum(1, keepdim=True), first_TE


def right(block, hidden, padding_mask=None):
    """y_t = sum over the two best experts of w f(x_t)."""
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    weight_TE, _ = shares(block, hidden_TD)
    out_TD = sum(weight_TE[:, e, None] * block.experts[f"expert_{e}"](hidden_TD) for e in range(block.num_experts))
    return out_TD.view_as(hidden)


def wrong(block, hidden, padding_mask=None):
    """As 5.23: the 0 or 1 that says whether an expert is the first choice is taken for the number of an expert."""
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    weight_TE, first_TE = shares(block, hidden_TD)
    zero_TD, one_TD = (block.experts[f"expert_{e}"](hidden_TD) for e in (0, 1))
    share_1 = (weight_TE * first_TE).sum(1, keepdim=True)
    share_0 = (weight_TE * (1 - first_TE)).sum(1, keepdim=True)
    return (share_0 * zero_TD + share_1 * one_TD).view_as(hidden)


@pytest.fixture
def found(monkeypatch):
    """Sets what the small run finds."""

    def set_forward(forward):
        monkeypatch.setattr(nllb.NllbMoeSparseMLP, "forward", forward)
        wrong_forward.nllb_is_right.cache_clear()

    yield set_forward
    wrong_forward.nllb_is_right.cache_clear()


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 32, "encoder_sparse_step": 1}
    return nllb.NllbMoeForConditionalGeneration(nllb.NllbMoeConfig(**OPTIONS, **sizes)).eval()


def test_the_installed_transformers_is_judged_by_what_it_computes():
    torch.manual_seed(3)
    block = nllb.NllbMoeSparseMLP(nllb.NllbMoeConfig(**OPTIONS), 8).eval()
    hidden = torch.randn(1, 20, 8)
    with torch.no_grad():
        out = block(hidden)
        errors = [(out - formula(block, hidden)).abs().max() for formula in (right, wrong)]
    assert min(errors) < 1e-5
    assert max(errors) > 0.1
    assert wrong_forward.nllb_is_right() == (errors[0] < 1e-5)


@pytest.mark.parametrize(("forward", "verdict"), [(right, True), (wrong, False)], ids=["right", "wrong"])
def test_the_probe_tells_right_from_wrong(forward, verdict, found):
    found(forward)
    state = torch.random.get_rng_state()
    assert wrong_forward.nllb_is_right() == verdict
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_wrong_one_is_refused_everywhere(found, model, tmp_path):
    found(wrong)
    model.save_pretrained(tmp_path)
    with pytest.raises(NotExpressibleError, match=MESSAGE):
        load_model(tmp_path)
    for read in (record, capture):
        with pytest.raises(NotExpressibleError, match=MESSAGE), read(model):
            pass
    with pytest.raises(NotExpressibleError, match=MESSAGE):
        install(model, "topk-softmax")


def test_a_repaired_one_is_judged_by_what_it_is(found, model, tmp_path):
    found(right)
    model.save_pretrained(tmp_path)
    with pytest.raises(FileFormatError, match="cannot be loaded"):  # it is no decoder
        load_model(tmp_path)
    with pytest.raises(NotExpressibleError, match="nllb-moe: it is an encoder and a decoder"):
        install(model, "topk-softmax")


def test_other_families_are_not_asked(monkeypatch):
    monkeypatch.setattr(wrong_forward, "nllb_is_right", lambda: pytest.fail("asked"))
    wrong_forward.check_forward("mixtral")
