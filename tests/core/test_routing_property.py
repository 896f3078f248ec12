"""What must hold for every routing, without knowing how its statistics are computed.

T tokens, E experts, K slots a token.
"""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mixtura.core import routing as r
from mixtura.core.errors import ShapeError
from mixtura.core.routing import Routing

LIBRARIES = {"numpy": np.asarray, "torch": torch.as_tensor}
every_library = pytest.mark.parametrize("convert", LIBRARIES.values(), ids=LIBRARIES)


@st.composite
def routings(draw, least_tokens=0):
    """Rows of experts without repetition, each slot filled or empty."""
    T, E = draw(st.integers(least_tokens, 5)), draw(st.integers(1, 9))
    K = draw(st.integers(1, E))
    slot = st.tuples(st.booleans(), st.integers(1, 16))
    indices_TK, weights_TK = np.full((T, K), E), np.zeros((T, K))
    for t in range(T):
        experts = draw(st.permutations(range(E)))
        for k, (is_filled, weight) in enumerate(draw(st.lists(slot, min_size=K, max_size=K))):
            if is_filled:
                indices_TK[t, k], weights_TK[t, k] = experts[k], weight / 4
    return Routing(np.zeros((T, E)), weights_TK, indices_TK)


def masks(routing):
    return st.lists(st.booleans(), min_size=len(routing.indices_TK), max_size=len(routing.indices_TK)).map(
        lambda mask: np.array(mask, dtype=bool)
    )


def of(convert, routing):
    return Routing(*map(convert, routing))


def same(one, other):
    for part, expected in zip(one, other, strict=True):
        np.testing.assert_array_equal(np.asarray(part), np.asarray(expected))


@every_library
@given(data=st.data())
def test_statistics_add_up_over_parts_of_the_tokens(convert, data):
    plain = data.draw(routings())
    mask_T = data.draw(masks(plain))
    routing, inside_T, outside_T = of(convert, plain), convert(mask_T), convert(~mask_T)
    whole_E = np.asarray(r.counts(routing))
    np.testing.assert_array_equal(
        np.asarray(r.counts(routing, inside_T)) + np.asarray(r.counts(routing, outside_T)), whole_E
    )
    assert whole_E.sum() == (plain.indices_TK < routing.num_experts).sum()
    np.testing.assert_array_equal(
        np.asarray(r.counts(r.keep(routing, inside_T))), np.asarray(r.counts(routing, inside_T))
    )
    parts = [np.asarray(r.dense(r.keep(routing, part_T))) for part_T in (inside_T, outside_T)]
    np.testing.assert_array_equal(parts[0] + parts[1], np.asarray(r.dense(routing)))


@every_library
@given(data=st.data())
def test_keeping_twice_is_keeping_both(convert, data):
    plain = data.draw(routings())
    one_T, two_T = data.draw(masks(plain)), data.draw(masks(plain))
    routing = of(convert, plain)
    both = r.keep(routing, convert(one_T & two_T))
    same(r.keep(r.keep(routing, convert(one_T)), convert(two_T)), both)
    same(r.keep(both, convert(one_T & two_T)), both)
    same(r.only(both, convert(one_T & two_T)), r.only(routing, convert(one_T & two_T)))
    r.check(both)


@every_library
@given(plain=routings(), seed=st.integers(0, 9))
def test_the_order_of_slots_and_tokens_says_nothing(convert, plain, seed):
    T, K = plain.indices_TK.shape
    rng = np.random.default_rng(seed)
    slots_K, tokens_T = rng.permutation(K), rng.permutation(T)
    routing = of(convert, plain)
    moved = of(convert, Routing(*(part[tokens_T] for part in (plain.logits_TE, *(x[:, slots_K] for x in plain[1:])))))
    np.testing.assert_array_equal(np.asarray(r.dense(moved)), np.asarray(r.dense(routing))[tokens_T])
    np.testing.assert_array_equal(np.asarray(r.counts(moved)), np.asarray(r.counts(routing)))
    np.testing.assert_allclose(np.asarray(r.importance(moved)), np.asarray(r.importance(routing)))


@every_library
@given(plain=routings())
def test_shares_are_shares_and_measures_lie_in_their_bounds(convert, plain):
    routing = of(convert, plain)
    E, filled = routing.num_experts, bool((plain.indices_TK < routing.num_experts).any())
    for share_E in (r.load(routing), r.importance(routing)):
        assert float(share_E.sum()) == pytest.approx(float(filled))
        assert (np.asarray(share_E) >= 0).all()
    load_E = r.load(routing)
    assert -1e-6 <= r.violation(load_E) <= E - 1 + 1e-5
    if filled:
        assert 1 - 1e-6 <= r.effective_experts(load_E) <= E * (1 + 1e-6)


@every_library
@pytest.mark.parametrize("fault", ["below", "beyond", "weight of an empty slot", "twice", "length"])
@given(data=st.data())
def test_check_finds_one_fault_anywhere(convert, fault, data):
    plain = data.draw(routings(least_tokens=1))
    (T, K), E = plain.indices_TK.shape, plain.num_experts
    t, k = data.draw(st.integers(0, T - 1)), data.draw(st.integers(0, K - 1))
    indices_TK, weights_TK, logits_TE = plain.indices_TK.copy(), plain.weights_TK.copy(), plain.logits_TE
    if fault == "twice":
        assume(K > 1)
        indices_TK[t, :2] = data.draw(st.integers(0, E - 1))
    elif fault == "length":
        logits_TE = logits_TE[1:]
    else:
        indices_TK[t, k] = {"below": -1, "beyond": E + 1, "weight of an empty slot": E}[fault]
        weights_TK[t, k] = 0.5
    with pytest.raises(ShapeError):
        r.check(of(convert, Routing(logits_TE, weights_TK, indices_TK)))
