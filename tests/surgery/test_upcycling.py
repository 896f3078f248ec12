"""Sparse and drop-upcycling: the invariants of their rows, and what the receipt says."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtura.core import MixturaWarning, NotExpressibleError, OptionError, UnknownNameError
from mixtura.hf import feed_forward_sites, mixtures
from mixtura.hf.count import count_parameters
from mixtura.nn.dense import FeedForwardWeights
from mixtura.nn.experts.feed_forward import view_expert
from mixtura.surgery.drop_upcycling import drop_upcycling
from mixtura.surgery.sparse_upcycling import sparse_upcycling
from mixtura.surgery.upcycle import upcycle
from pico import DENSE, SPARSE, pico, tokens

D, F, T = 16, 24, 11


def dense(gated=True, bias=False, seed=0):
    torch.manual_seed(seed)
    gate, up, down = torch.randn(F, D), torch.randn(F, D), torch.randn(D, F)
    biases = (torch.randn(F), torch.randn(F), torch.randn(D)) if bias else (None, None, None)
    return FeedForwardWeights(gate if gated else None, up, down, biases[0] if gated else None, *biases[1:], "gelu")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"copies": 4, "shards": 1, "k": 2},
        {"copies": 3, "shards": 2, "k": 2},
        {"copies": 3, "shards": 2, "k": 4},
        {"copies": 2, "shards": 4, "k": 4, "router_init": "uniform"},
        {"copies": 3, "shards": 2, "k": 2, "shared": 0.25},
        {"copies": 1, "shards": 1, "k": 1},
    ],
)
def test_the_function_is_preserved_for_every_router(gated, bias, options):
    weights, x = dense(gated, bias), torch.randn(T, D)
    made = sparse_upcycling(weights, **options)
    assert made.preserves
    for seed in range(3):
        rows = torch.randn(options["copies"], D, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            made.mixture.router.gate.weight.copy_(rows.repeat_interleave(options["shards"], 0))
        torch.testing.assert_close(made.mixture(x), weights(x), rtol=1e-5, atol=1e-4)


def test_untied_rows_of_shards_break_the_function():
    """Why rows are tied: with rows of their own, shards of different copies are mixed."""
    weights, x = dense(), torch.randn(T, D)
    mixture = sparse_upcycling(weights, copies=3, shards=2, k=2).mixture
    with torch.no_grad():
        mixture.router.gate.weight.normal_()
    assert (mixture(x) - weights(x)).abs().max() > 1


def test_merging_the_copies_back_is_the_identity():
    weights = dense()
    experts = sparse_upcycling(weights, copies=5, shards=1, k=2).mixture.experts
    shares = torch.rand(5)
    shares /= shares.sum()
    for part, original in (("up_FD", weights.up_FD), ("gate_FD", weights.gate_FD), ("down_DF", weights.down_DF)):
        merged = sum(share * getattr(view_expert(experts, e), part) for e, share in enumerate(shares))
        torch.testing.assert_close(merged, original)


def test_noise_is_drawn_for_each_copy_and_promises_nothing():
    weights = dense()
    made = sparse_upcycling(weights, copies=3, shards=1, k=2, noise=0.1)
    assert not made.preserves
    ups = made.mixture.experts.gate_up_proj.detach()
    assert not torch.equal(ups[0], ups[1])
    assert float((ups[0, F:] - weights.up_FD).std()) == pytest.approx(0.1 * float(weights.up_FD.std()), rel=0.2)


def test_ratio_zero_is_sparse_upcycling():
    one = drop_upcycling(dense(), copies=3, shards=1, k=2, ratio=0.0, seed=4)
    two = sparse_upcycling(dense(), copies=3, shards=1, k=2, seed=4)
    assert one.preserves
    for ours, theirs in zip(one.mixture.parameters(), two.mixture.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def untouched(made, weights, e):
    """Which hidden units of expert e are whole."""
    view = view_expert(made.mixture.experts, e)
    same = [(view.gate_FD == weights.gate_FD).all(1), (view.up_FD == weights.up_FD).all(1)]
    return torch.stack([*same, (view.down_DF == weights.down_DF).all(0)]).all(0)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_shared_indices_leave_one_minus_ratio_whole(ratio):
    weights = dense()
    made = drop_upcycling(weights, copies=3, k=2, ratio=ratio)
    for e in range(3):
        assert int(untouched(made, weights, e).sum()) == round((1 - ratio) * F)


def test_independent_indices_leave_fewer_whole_and_say_so():
    torch.manual_seed(0)
    weights = FeedForwardWeights(
        torch.randn(800, D), torch.randn(800, D), torch.randn(D, 800), None, None, None, "silu"
    )
    with pytest.warns(MixturaWarning, match=r"leaves \(1 - ratio\)\^3 = 0.125"):
        made = drop_upcycling(weights, copies=2, k=2, indices="independent")
    whole = float(torch.stack([untouched(made, weights, e) for e in range(2)]).float().mean())
    assert whole == pytest.approx(0.125, abs=0.03)


def test_mean_and_spread_of_each_matrix_are_kept():
    torch.manual_seed(0)
    wide = FeedForwardWeights(
        3 + 2 * torch.randn(400, D), torch.randn(400, D) - 1, 0.1 * torch.randn(D, 400), None, None, None, "silu"
    )
    experts = drop_upcycling(wide, copies=2, k=2, ratio=1.0).mixture.experts.requires_grad_(False)
    view = view_expert(experts, 0)
    for new, old in ((view.gate_FD, wide.gate_FD), (view.up_FD, wide.up_FD), (view.down_DF, wide.down_DF)):
        assert float(new.mean()) == pytest.approx(float(old.mean()), abs=0.05 * float(old.std()))
        assert float(new.std()) == pytest.approx(float(old.std()), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": 0}, "copies must be at least 1, got 0"),
        ({"copies": 2, "shards": 1, "k": 3}, "at most copies"),
        ({"shards": 2, "k": 3}, "multiple of shards = 2"),
        ({"shards": 7, "k": 7}, "shards must divide the 24"),
        ({"noise": -1.0}, "noise must be at least 0, got -1"),
        ({"shared": 1.0}, "shared must lie in"),
        ({"router_init": "zeros"}, "router_init must be"),
        ({"router_rows_CD": torch.zeros(3, D)}, r"shape \(4, 16\), got \(3, 16\)"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        sparse_upcycling(dense(), **options)


@pytest.mark.parametrize("base", DENSE)
def test_every_base_keeps_its_logits_and_survives_saving(base, tmp_path):
    x = tokens()
    before = pico(base)(x).logits
    model, receipt = upcycle(pico(base), layers="last:2", copies=3, shards=2, k=2)
    assert receipt["preserves_the_function"]
    assert receipt["max_logit_difference"] < 1e-4
    torch.testing.assert_close(model(x).logits, before, rtol=0, atol=1e-4)
    assert list(mixtures(model)) == ["1", "2"]
    gate = 2 * 6 * 32
    assert receipt["active_parameters"]["after"] == receipt["active_parameters"]["before"] + gate + _extra_bias(base)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, model(x).logits)


def _extra_bias(base):
    """Every shard has the output bias of its copy: one more a layer is active."""
    return 2 * 32 if feed_forward_sites(pico(base))[0].read().down_bias_D is not None else 0


def test_whole_copies_with_weight_one_are_bit_equal():
    """Where arithmetic allows: as many rows in one product as the kernel takes at once."""
    with pytest.warns(MixturaWarning, match="top-1"):
        receipt = upcycle(pico("llama"), layers="all", copies=4, shards=1, k=1).receipt
    assert receipt["max_logit_difference"] == 0


@pytest.mark.parametrize("base", SPARSE)
def test_what_is_a_mixture_already_is_refused_by_name(base):
    with pytest.raises(NotExpressibleError, match="layer 0 is a mixture already"):
        upcycle(pico(base), layers="all")


def test_given_rows_become_the_router():
    rows = {2: torch.randn(4, 32)}
    model, receipt = upcycle(pico("llama"), layers=[2], router_rows=rows)
    assert torch.equal(mixtures(model)["2"].router.gate.weight, rows[2].repeat_interleave(2, 0))
    assert receipt["router"] == "fitted"


def test_drop_upcycling_promises_nothing_and_reports_the_difference():
    receipt = upcycle(pico("llama"), "drop-upcycling", layers="last:1").receipt
    assert not receipt["preserves_the_function"]
    assert receipt["max_logit_difference"] > 1e-4
    assert receipt["options"]["ratio"] == 0.5


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", [0, 1, 2]),
        ("last:2", [1, 2]),
        ("first:1", [0]),
        ("every:2", [1]),
        ("0-1", [0, 1]),
        ([2, 0], [0, 2]),
        ("2", [2]),
    ],
)
def test_layers_are_chosen_by_text_or_number(layers, chosen):
    assert upcycle(pico("llama"), layers=layers).receipt["layers"] == chosen


@pytest.mark.parametrize("layers", ["last:4", "some", [3], [], "2-5", "every:0"])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(OptionError, match="layers"):
        upcycle(pico("llama"), layers=layers)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'sparse-upcycling'"):
        upcycle(pico("llama"), "sparse-upcyclin")
    with pytest.raises(OptionError, match="did you mean 'copies'"):
        upcycle(pico("llama"), copis=3)


def test_counts_equal_the_sum_over_tensors():
    model = upcycle(pico("llama"), layers="last:1", copies=4, shards=2, k=2).model
    expert = 3 * 32 * 24
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model) == (total, total - 6 * expert, total)


def test_native_mixtures_are_counted():
    model = pico("olmoe")
    expert = 3 * 32 * 48
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model).active == total - 3 * 2 * expert
