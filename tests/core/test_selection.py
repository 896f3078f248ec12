"""``select`` against a row-by-row oracle that knows nothing of arrays, on numpy and torch.

T tokens, E experts, K slots a token.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtura.core import routing as r
from mixtura.core.errors import OptionError, ShapeError
from mixtura.core.selection import SelectionSpec, select


def score_row(name, row):
    if name == "softmax":
        top = max(row)
        total = sum(math.exp(x - top) for x in row)
        return [math.exp(x - top) / total for x in row]
    if name == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in row]
    return [max(x, 0.0) for x in row] if name == "relu" else list(row)


def best(values, k):
    """Places of the k largest; ties to the lowest place."""
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def eligible(choice, spec):
    """Places inside of the groups kept."""
    M = len(choice) // spec.groups
    groups = [choice[g * M : g * M + M] for g in range(spec.groups)]
    depth = 1 if spec.group_score == "max" else 2
    kept = best([sum(sorted(group)[-depth:]) for group in groups], spec.groups_kept)
    return [e // M in kept for e in range(len(choice))]


def select_row(row, spec, bias=None):
    """Indices and weights of one token."""
    if spec.order == "topk-score":
        indices = best(row, spec.k)
        weights = score_row(spec.score, [row[e] for e in indices])
    else:
        scores = score_row(spec.score, row)
        choice = [s + b for s, b in zip(scores, bias or [0.0] * len(scores), strict=True)]
        if spec.groups > 1:
            inside = eligible(choice, spec)
            choice = [c if ok else spec.group_fill for c, ok in zip(choice, inside, strict=True)]
            scores = [s if ok else 0.0 for s, ok in zip(scores, inside, strict=True)]
        indices = best(choice, spec.k)
        weights = [scores[e] for e in indices]
    if spec.p is not None and spec.p < 1:
        number = next((n for n in range(1, spec.k) if sum(weights[:n]) > spec.p), spec.k)
        indices = indices[:number] + [len(row)] * (spec.k - number)
        weights = weights[:number] + [0.0] * (spec.k - number)
    weights = [w if e < len(row) - spec.null_experts else 0.0 for e, w in zip(indices, weights, strict=True)]
    if spec.renormalize is not None and any(weights):
        norm = sum(abs(w) ** spec.renormalize for w in weights) ** (1 / spec.renormalize) + spec.eps
        weights = [w / max(norm, spec.norm_min) for w in weights]
    return indices, [w * spec.scale for w in weights]


@st.composite
def cases(draw):
    """Logits with ties, a spec that fits them, and a bias or none."""
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    E = groups * draw(st.integers(1, 3))
    kept = draw(st.integers(1, groups))
    fill = draw(st.sampled_from([-math.inf, 0.0]))
    order = draw(st.sampled_from(["score-topk", "topk-score"])) if groups == 1 else "score-topk"
    score = draw(st.sampled_from(["softmax", "sigmoid", "relu", "none"]))
    spec = SelectionSpec(
        k=draw(st.integers(1, E // groups * kept if fill else E)),
        # no sum of probabilities comes near these by rounding, but 0 and 1, which are exact
        p=draw(st.sampled_from([None, 0.0, 0.377, 0.791, 1.0])) if score == "softmax" else None,
        score=score,
        order=order,
        renormalize=draw(st.sampled_from([None, 1, 2, 3])),
        eps=draw(st.sampled_from([0.0, 1e-6])),
        norm_min=draw(st.sampled_from([0.0, 0.5])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        groups=groups,
        groups_kept=kept,
        group_score=draw(st.sampled_from(["max", "top2-sum"])),
        group_fill=fill,
        null_experts=draw(st.integers(0, E - 1)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    # quarters are exact in float32, so that ties are ties for every score
    logits_TE = rng.integers(-8, 8, (draw(st.integers(0, 5)), E)) / 4
    bias_E = rng.integers(-4, 4, E) / 4 if order == "score-topk" and draw(st.booleans()) else None
    return logits_TE, spec, bias_E


@given(cases())
def test_equals_the_oracle(case):
    logits_TE, spec, bias_E = case
    rows = [select_row(row.tolist(), spec, None if bias_E is None else bias_E.tolist()) for row in logits_TE]
    for convert in (np.asarray, torch.as_tensor):
        routing = select(convert(logits_TE), spec, None if bias_E is None else convert(bias_E))
        assert routing.indices_TK.tolist() == [indices for indices, _ in rows]
        expected_TK = np.array([weights for _, weights in rows]).reshape(-1, spec.k)
        np.testing.assert_allclose(np.asarray(routing.weights_TK), expected_TK, rtol=1e-9, atol=1e-12)
        r.check(routing)


@given(cases())
def test_numpy_equals_torch_in_float32(case):
    logits_TE, spec, _ = case
    logits_TE = logits_TE.astype(np.float32)
    ours, theirs = select(logits_TE, spec), select(torch.from_numpy(logits_TE), spec)
    assert ours.weights_TK.dtype == np.float32
    assert theirs.weights_TK.dtype == torch.float32
    np.testing.assert_array_equal(ours.indices_TK, theirs.indices_TK)
    np.testing.assert_allclose(ours.weights_TK, theirs.weights_TK, rtol=1e-5, atol=1e-7)


def test_null_experts_neither_weigh_nor_count(generator):
    """The others get what they would get if the nulls were cut off and theirs were the only slots left."""
    logits_TE = torch.randn(40, 6, generator=generator)
    routing = select(logits_TE, SelectionSpec(k=3, renormalize=1, null_experts=2))
    chosen_TE = r.scatter_count(routing)[:, :4] > 0
    scores_TE = logits_TE[:, :4].masked_fill(~chosen_TE, -math.inf).softmax(-1).nan_to_num(0)
    torch.testing.assert_close(r.dense(routing)[:, :4], scores_TE)
    assert not r.dense(routing)[:, 4:].any()
    assert set(chosen_TE.sum(1).tolist()) == {1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "relu", "none"])
def test_low_precision_is_scored_in_float32(dtype, score, generator):
    low_TE = torch.randn(20, 6, generator=generator).to(dtype)
    spec = SelectionSpec(k=3, score=score, renormalize=2)
    routing, expected = select(low_TE, spec), select(low_TE.float(), spec)
    assert routing.logits_TE is low_TE
    assert routing.weights_TK.dtype == torch.float32
    assert torch.equal(routing.weights_TK, expected.weights_TK)
    assert torch.equal(routing.indices_TK, expected.indices_TK)


def test_float16_of_numpy_and_integers_are_scored_in_float32():
    for logits_TE in (np.array([[1, 2, 3]], np.float16), np.array([[1, 2, 3]])):
        assert select(logits_TE, SelectionSpec(k=2)).weights_TK.dtype == np.float32


@pytest.mark.parametrize("p", [0.5, 1, 2])
def test_weights_that_are_all_zero_stay_zero_and_have_a_finite_gradient(p):
    logits_TE = torch.tensor([[-1.0, -2.0], [1.0, 2.0]], requires_grad=True)
    routing = select(logits_TE, SelectionSpec(k=2, score="relu", renormalize=p))
    (routing.weights_TK * torch.tensor([[1.0, 2.0]])).sum().backward()
    assert routing.weights_TK[0].tolist() == [0, 0]
    assert logits_TE.grad[0].tolist() == [0, 0]
    assert logits_TE.grad[1].isfinite().all()
    assert logits_TE.grad[1].any()


def test_the_bias_chooses_and_never_weighs():
    logits_TE = torch.tensor([[3.0, 2.0, 1.0]])
    routing = select(logits_TE, SelectionSpec(k=1, score="sigmoid"), torch.tensor([0.0, 0.0, 1.0]))
    assert routing.indices_TK.tolist() == [[2]]
    assert routing.weights_TK.item() == torch.tensor(1.0).sigmoid().item()


def test_a_zero_bias_is_no_bias(generator):
    logits_TE = torch.randn(9, 6, generator=generator)
    spec = SelectionSpec(k=2, groups=3, groups_kept=2)
    assert torch.equal(select(logits_TE, spec).weights_TK, select(logits_TE, spec, torch.zeros(6)).weights_TK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"score": "softmx"}, "score must be one of 'softmax', .*got 'softmx'"),
        ({"order": "topk"}, "order must be one of"),
        ({"weight_on": "both"}, "weight_on must be one of"),
        ({"group_score": "mean"}, "group_score must be one of"),
        ({"renormalize": 0}, "renormalize must be None or"),
        ({"p": -0.1}, "p must be None, or at least 0 with score 'softmax', got -0.1 with 'softmax'"),
        ({"p": 0.5, "score": "sigmoid"}, "p must be None, or at least 0 .* got 0.5 with 'sigmoid'"),
        ({"groups": 2, "groups_kept": 3}, "groups_kept must lie in 1 .. groups = 2, got 3"),
        ({"groups": 2, "order": "topk-score"}, "groups need order 'score-topk'"),
    ],
)
def test_a_spec_refuses(options, message):
    with pytest.raises(OptionError, match=message):
        SelectionSpec(**{"k": 1, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, "k must be at most the number of experts 4, got 5"),
        ({"k": 1, "null_experts": 4}, "null_experts must lie in 0 .. 3, got 4"),
        ({"k": 1, "null_experts": -1}, "null_experts must lie in 0 .. 3, got -1"),
        ({"k": 1, "groups": 3}, "groups must divide the number of experts 4, got 3"),
        ({"k": 3, "groups": 2}, "k must be at most the 2 experts of the groups kept, got 3"),
    ],
)
def test_select_refuses_a_spec_that_does_not_fit(options, message):
    with pytest.raises(OptionError, match=message):
        select(np.zeros((1, 4)), SelectionSpec(**options))


def test_select_refuses_shapes_and_a_bias_after_the_choice():
    with pytest.raises(ShapeError, match="logits_TE must have 2 dimensions"):
        select(np.zeros(4), SelectionSpec(k=1))
    with pytest.raises(ShapeError, match=r"bias_E must have shape \(4,\), got \(1, 4\)"):
        select(np.zeros((1, 4)), SelectionSpec(k=1), np.zeros((1, 4)))
    with pytest.raises(OptionError, match="a selection bias needs order 'score-topk'"):
        select(np.zeros((1, 4)), SelectionSpec(k=1, order="topk-score"), np.zeros(4))
