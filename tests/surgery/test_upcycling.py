"""Sparse and drop-upcycling: the invariants of their rows, and what the receipt says."""

import gc
import json
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtura.core import MixturaError, MixturaWarning, NotExpressibleError, OptionError, UnknownNameError, registry
from mixtura.hf import feed_forward_sites, mixtures
from mixtura.hf.count import count_parameters
from mixtura.nn.backends import naive_backend
from mixtura.nn.dense import FeedForwardWeights
from mixtura.nn.experts.feed_forward import view_expert
from mixtura.surgery.conversion import Conversion
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
        ({"copies": 0}, "copies must be a whole number of at least 1, got 0"),
        ({"copies": 2.0}, r"copies must be a whole number of at least 1, got 2\.0"),
        ({"k": "2"}, "k must be a whole number of at least 1, got '2'"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"copies": 2, "shards": 1, "k": 3}, "at most copies"),
        ({"shards": 2, "k": 3}, "multiple of shards = 2"),
        ({"shards": 7, "k": 7}, "shards must divide the 24"),
        ({"noise": -1.0}, "noise must be a number of at least 0, got -1"),
        ({"noise": "1e-2"}, "noise must be a number of at least 0, got '1e-2'"),
        ({"noise": float("nan")}, "noise must be a number of at least 0, got nan"),
        ({"shared": 1.0}, "shared must leave some of the 24 hidden units"),
        ({"shared": 1.5}, r"shared must be a number in 0 \.\. 1, got 1\.5"),
        ({"router_init": "zeros"}, "router_init must be"),
        ({"router_rows_CD": torch.zeros(3, D)}, r"shape \(4, 16\), got \(3, 16\)"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        sparse_upcycling(dense(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ratio": 2}, "ratio must be a number in"), ({"indices": "same"}, "indices must be 'shared' or 'independent'")],
)
def test_wrong_options_of_dropping_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        drop_upcycling(dense(), **options)


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_two_whole_copies_are_bit_equal_where_halves_are(copies):
    """w f + (1 - w) f rounds; with equal logits both weights are 1/2 and nothing does."""
    weights, x = dense(), torch.randn(T, D)
    mixture = sparse_upcycling(weights, copies=copies, shards=1, k=2, router_rows_CD=torch.zeros(copies, D)).mixture
    alone = naive_backend(mixture.experts, x, torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1))
    assert torch.equal(naive_backend(mixture.experts, x, *mixture.router(x)[:0:-1]), alone)


@pytest.mark.parametrize(("shards", "k"), [(1, 2), (2, 2), (2, 4), (4, 4)])
def test_the_gate_learns_at_first_within_copies_only(shards, k):
    """Equal copies answer alike: their gradient is 0; that of the shards of a copy is not, but sums to 0."""
    made = sparse_upcycling(dense(), copies=4, shards=shards, k=k).mixture
    (made(torch.randn(T, D)) * torch.randn(T, D)).sum().backward()
    gradient = made.router.gate.weight.grad.view(4, shards, D)
    within = gradient - gradient.mean(1, keepdim=True)
    assert gradient.sum(1).norm() < 1e-3
    assert (within.norm() > 100) == (shards > 1)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_tied_rows_give_whole_copies_also_under_stock_top_k(shards):
    """torch.topk promises no order among equals; as a set the shards of the best copies come out."""
    made = sparse_upcycling(dense(), copies=5, shards=shards, k=2 * shards).mixture
    x = torch.randn(500, D)
    logits, _, ours = made.router(x)
    theirs = logits.softmax(-1).topk(2 * shards).indices
    assert torch.equal(ours.sort().values, theirs.sort().values)
    copies = (ours // shards).sort().values.view(500, 2, shards)
    assert (copies == copies[..., :1]).all()


def test_the_shared_expert_keeps_its_weights_under_noise():
    weights = dense()
    made = sparse_upcycling(weights, copies=2, shards=1, k=2, shared=0.25, noise=0.5).mixture
    assert torch.equal(made.shared.up_proj.weight, weights.up_FD[: F // 4])


def test_noise_is_relative_to_each_matrix():
    loud, weights = 100.0, dense()
    weights = weights._replace(up_FD=weights.up_FD * loud)
    ups = sparse_upcycling(weights, copies=1, shards=1, k=1, noise=0.1).mixture.experts.gate_up_proj[0].detach()
    assert float((ups[:F] - weights.gate_FD).std()) == pytest.approx(0.1, rel=0.3)
    assert float((ups[F:] - weights.up_FD).std()) == pytest.approx(0.1 * loud, rel=0.3)


def test_biases_of_one_entry_survive_noise():
    made = sparse_upcycling(dense(bias=True), copies=2, shards=F, k=F, noise=0.1).mixture
    assert all(parameter.isfinite().all() for parameter in made.parameters())


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


def test_whole_copies_with_weight_one_change_rounding_at_most():
    """A product of fewer rows may round otherwise: some processors give 0, others the last bit."""
    with pytest.warns(MixturaWarning, match="top-1"):
        receipt = upcycle(pico("llama"), layers="all", copies=4, shards=1, k=1).receipt
    assert receipt["max_logit_difference"] < 2e-7


@pytest.mark.parametrize("base", SPARSE)
def test_what_is_a_mixture_already_is_refused_by_name(base):
    with pytest.raises(NotExpressibleError, match="layer 0 is a mixture already"):
        upcycle(pico(base), layers="all")


def test_given_rows_become_the_router():
    rows = {2: torch.randn(4, 32)}
    model, receipt = upcycle(pico("llama"), layers=[2], router_rows=rows)
    assert torch.equal(mixtures(model)["2"].router.gate.weight, rows[2].repeat_interleave(2, 0))
    assert receipt["router"] == "fitted"
    with pytest.raises(OptionError, match=r"router_rows must have rows for layer 1, got layers \[2\]"):
        upcycle(pico("llama"), layers=[1, 2], router_rows=rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_half_precision_is_kept_and_its_rounding_is_no_breach(base, dtype):
    model, receipt = upcycle(pico(base).to(dtype), layers="all", copies=4, shards=2, k=2)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert receipt["preserves_the_function"]
    assert receipt["dtype"] == str(dtype).removeprefix("torch.")


def test_the_receipt_is_json_and_says_what_was_done():
    receipt = json.loads(json.dumps(upcycle(pico("llama"), layers=[2], copies=3, shards=4, k=4).receipt))
    assert receipt["options"] == {
        "copies": 3,
        "shards": 4,
        "k": 4,
        "noise": 0.0,
        "shared": 0.0,
        "router_init": "normal",
        "seed": 0,
    }
    assert (receipt["tied_router_rows"], receipt["router"]) == (4, "random")
    assert receipt["bit_equal"] == (receipt["max_logit_difference"] == 0)


def test_noise_promises_nothing_and_says_so():
    receipt = upcycle(pico("llama"), layers="all", noise=0.5).receipt
    assert not receipt["preserves_the_function"]
    assert not receipt["bit_equal"]
    assert receipt["max_logit_difference"] > 1e-4


def lies(dense: FeedForwardWeights, *, factor: float = 2.0) -> Conversion:
    """A surgery that doubles the layer and promises that nothing changed."""
    made = sparse_upcycling(dense).mixture
    with torch.no_grad():
        made.experts.down_proj.mul_(factor)
    return Conversion(made, preserves=True)


def test_a_broken_promise_is_an_error(monkeypatch):
    monkeypatch.setattr(registry, "methods", lambda role: [registry.Method("lies", role, lies)])
    with pytest.raises(MixturaError, match="lies promised equal logits, but they differ"):
        upcycle(pico("llama", initializer_range=0.3), "lies", layers="all")
    with pytest.raises(MixturaError, match="not finite"):
        upcycle(pico("llama"), "lies", layers="all", factor=float("nan"))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.long), r"token ids \(B, Q\)"),
        (torch.zeros(2, 3), r"token ids \(B, Q\), got torch\.float32"),
        (torch.full((1, 4), 64), r"lie in 0 \.\. 63, got 64 \.\. 64"),
    ],
)
def test_tokens_that_are_no_ids_are_refused(ids, message):
    with pytest.raises(OptionError, match=message):
        upcycle(pico("llama"), tokens_BQ=ids)


def test_the_mode_is_kept_and_dense_layers_are_let_go():
    model = pico("llama").train()
    gone, kept = weakref.ref(model.model.layers[2].mlp), weakref.ref(model.model.layers[0].mlp)
    upcycled = upcycle(model, layers=[2]).model
    gc.collect()
    assert upcycled.training
    assert gone() is None
    assert kept() is upcycled.model.layers[0].mlp


def test_a_refusal_leaves_the_model_alone():
    model = pico("llama")
    before = model(tokens()).logits
    with pytest.raises(OptionError, match="multiple of shards"):
        upcycle(model, layers="all", shards=2, k=3)
    assert torch.equal(model(tokens()).logits, before)


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


@pytest.mark.parametrize("layers", ["last:4", "some", [3], [], "2-5", "2-1", "every:0", 2, [1.0], [True], None])
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


@pytest.mark.parametrize("base", SPARSE)
def test_native_mixtures_are_counted(base):
    model = pico(base)
    expert = 3 * 32 * 48
    total = sum(p.numel() for p in model.parameters())
    assert count_parameters(model).active == total - 3 * 2 * expert


def test_native_mixtures_without_the_usual_name_for_k_are_counted():
    model = pico("aria_text", moe_num_experts=4, moe_topk=3, moe_num_shared_experts=1)
    experts = [m for m in model.modules() if getattr(m, "num_experts", None) == 4 and hasattr(m, "gate_up_proj")]
    idle = sum(p.numel() // 4 for module in experts for p in module.parameters())
    counts = count_parameters(model)
    assert counts.active == counts.total - idle


def test_active_parameters_are_what_a_token_passes():
    """Naive: the tensors that get a gradient when one token is run, expert by expert."""
    model = upcycle(pico("llama", initializer_range=0.3), layers=[1, 2], copies=4, shards=2, k=4).model
    model(torch.tensor([[5]])).logits.square().sum().backward()
    experts = {id(p) for m in mixtures(model).values() for p in m.experts.parameters()}
    rest = sum(p.numel() for p in model.parameters() if id(p) not in experts)
    passed = sum(int(g.any()) * g.numel() for p in model.parameters() if id(p) in experts for g in p.grad)
    assert count_parameters(model).active == rest + passed
