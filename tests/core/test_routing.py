"""``Routing`` and its statistics, on numpy and torch alike, against sums written out by hand.

T tokens, E experts, K slots a token.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtura.core import routing as r
from mixtura.core.errors import ShapeError
from mixtura.core.routing import Routing

LIBRARIES = {"numpy": np.asarray, "torch": torch.as_tensor}


@st.composite
def routings(draw):
    """A valid routing in numpy, with empty slots, and a mask of its tokens."""
    T, E = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    K = draw(st.integers(1, E))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    indices_TK = np.array([rng.permutation(E)[:K] for _ in range(T)], dtype=np.int64).reshape(T, K)
    indices_TK[rng.random((T, K)) < 0.3] = E
    weights_TK = np.where(indices_TK == E, 0, rng.random((T, K))).astype(np.float32)
    logits_TE = rng.standard_normal((T, E)).astype(np.float32)
    return Routing(logits_TE, weights_TK, indices_TK), rng.random(T) < 0.7


def both(routing, mask_T):
    """The same routing and mask in each library."""
    for convert in LIBRARIES.values():
        yield Routing(*map(convert, routing)), convert(mask_T)


def written_out(routing, mask_T):
    """Gates (T, E), slots of each expert and weight of each expert, by loops over tokens and slots."""
    T, E = routing.logits_TE.shape
    gates, slots, weight = np.zeros((T, E), np.float32), [0] * E, [0.0] * E
    for t in range(T):
        for e, w in zip(routing.indices_TK[t], routing.weights_TK[t], strict=True):
            if e < E:
                gates[t, e] += w
                slots[e] += bool(mask_T[t])
                weight[e] += float(w) * bool(mask_T[t])
    return gates, slots, weight


@given(routings())
def test_statistics(drawn):
    gates_TE, slots, weight = written_out(*drawn)
    for routing, mask_T in both(*drawn):
        assert r.check(routing) is routing
        np.testing.assert_array_equal(r.dense(routing), gates_TE)
        assert r.counts(routing, mask_T).tolist() == slots
        np.testing.assert_allclose(r.load(routing, mask_T), np.array(slots) / max(sum(slots), 1), rtol=1e-6)
        np.testing.assert_allclose(r.importance(routing, mask_T), np.array(weight) / (sum(weight) or 1), rtol=1e-5)


@given(routings())
def test_keep_empties_the_other_tokens_and_no_more(drawn):
    for routing, mask_T in both(*drawn):
        kept = r.check(r.keep(routing, mask_T))
        np.testing.assert_array_equal(r.dense(kept), r.dense(routing) * np.asarray(mask_T)[:, None])
        assert r.counts(kept).tolist() == r.counts(routing, mask_T).tolist()
        assert not (kept.indices_TK[~mask_T] < routing.num_experts).any()


@pytest.mark.parametrize("convert", LIBRARIES.values(), ids=LIBRARIES)
def test_balance_of_known_loads(convert):
    even, one, none = (convert(np.array(p, dtype=np.float64)) for p in ([0.25] * 4, [0, 1.0, 0, 0], [0.0] * 4))
    assert r.violation(even) == 0
    assert r.violation(one) == 3
    assert r.violation(none) == 0
    assert r.entropy(even) == pytest.approx(math.log(4))
    assert r.entropy(one) == 0
    assert r.effective_experts(even) == pytest.approx(4)
    assert r.effective_experts(one) == 1


def made(weights, indices, E=3):
    return Routing(torch.zeros(len(indices), E), torch.tensor(weights), torch.tensor(indices))


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (Routing(torch.zeros(3), torch.zeros(1, 1), torch.zeros(1, 1)), "logits_TE must have 2 dimensions"),
        (
            Routing(torch.zeros(2, 3), torch.zeros(1, 1), torch.zeros(1, 1).long()),
            r"must be \(T, E\), \(T, K\), \(T, K\)",
        ),
        (made([[1.0]], [[4]]), "must lie in 0 .. 3"),
        (made([[1.0]], [[-1]]), "must lie in 0 .. 3"),
        (made([[0.5]], [[3]]), "an empty slot must have weight 0"),
        (made([[math.nan]], [[3]]), "an empty slot must have weight 0"),
        (made([[0.5, 0.5]], [[1, 1]]), "the same expert in two slots"),
    ],
)
def test_check_refuses(routing, message):
    with pytest.raises(ShapeError, match=message):
        r.check(routing)


@pytest.mark.parametrize("function", [r.keep, r.only, r.counts, r.load, r.importance])
@pytest.mark.parametrize(
    "mask_T", [torch.tensor([True]), torch.tensor([1, 0]), torch.ones(2, 1, dtype=torch.bool)], ids=str
)
def test_a_mask_that_is_not_one_boolean_a_token_is_refused(function, mask_T):
    with pytest.raises(ShapeError, match=r"mask_T must be boolean of shape \(2,\)"):
        function(made([[1.0], [1.0]], [[0], [1]]), mask_T)


@given(routings())
def test_only_takes_the_rows_of_the_mask(drawn):
    for routing, mask_T in both(*drawn):
        assert r.only(routing, None) is routing
        some = r.only(routing, mask_T)
        for part, whole in zip(some, routing, strict=True):
            np.testing.assert_array_equal(part, np.asarray(whole)[np.asarray(mask_T)])
