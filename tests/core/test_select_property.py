"""What must hold for every spec and shape, without knowing what ``select`` computes.

T tokens, E experts, K slots a token.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mixtura.core import routing as r
from mixtura.core.selection import SelectionSpec, select

QUARTERS = st.integers(-32, 32).map(lambda number: number / 4)  # exact in every type, so that ties are ties
EXTREMES = st.sampled_from([-np.inf, -3e38, -1e4, -104.0, -1.0, -1e-38, -0.0, 0.0, 1e-45, 1.0, 88.8, 1e4, 3e38])
LIBRARIES = {"numpy": np.asarray, "torch": torch.as_tensor}
every_library = pytest.mark.parametrize("convert", LIBRARIES.values(), ids=LIBRARIES)


@st.composite
def specs(draw, E, **fields):
    """A spec of one group that can choose among E experts."""
    options = {
        "k": st.integers(1, E),
        "score": st.sampled_from(["softmax", "sigmoid", "relu", "none"]),
        "order": st.sampled_from(["score-topk", "topk-score"]),
        "renormalize": st.sampled_from([None, 1, 2]),
        "scale": st.sampled_from([1.0, 2.5]),
    }
    return SelectionSpec(**{name: draw(option) for name, option in (options | fields).items()})


@st.composite
def cases(draw, elements=QUARTERS, max_experts=40, dtype=np.float64, **fields):
    """Logits of any shape, and a spec that fits them."""
    T, E = draw(st.integers(0, 5)), draw(st.integers(1, max_experts))
    return draw(arrays(dtype, (T, E), elements=elements)), draw(specs(E, **fields))


def equal(routing, other, rows=slice(None)):
    np.testing.assert_array_equal(np.asarray(routing.indices_TK), np.asarray(other.indices_TK)[rows])
    np.testing.assert_allclose(np.asarray(routing.weights_TK), np.asarray(other.weights_TK)[rows], rtol=1e-9)


@every_library
@given(case=cases())
def test_a_token_does_not_see_the_others(convert, case):
    logits_TE, spec = case
    whole = select(convert(logits_TE), spec)
    assert tuple(whole.indices_TK.shape) == (len(logits_TE), spec.k)
    for t in range(len(logits_TE)):
        equal(select(convert(logits_TE[t : t + 1]), spec), whole, slice(t, t + 1))


@every_library
@given(case=cases(), seed=st.integers(0, 9))
def test_it_permutes_with_the_experts(convert, case, seed):
    logits_TE, spec = case
    E = logits_TE.shape[1]
    logits_TE = logits_TE + np.arange(E) / 1024  # no ties
    order_E = np.random.default_rng(seed).permutation(E)
    routing, permuted = select(convert(logits_TE), spec), select(convert(logits_TE[:, order_E]), spec)
    scored = logits_TE if spec.score != "relu" or spec.order == "topk-score" else np.maximum(logits_TE, 0)
    distinct_T = np.array([len(set(row)) == E for row in scored], dtype=bool)
    np.testing.assert_array_equal(
        order_E[np.asarray(permuted.indices_TK)][distinct_T], np.asarray(routing.indices_TK)[distinct_T]
    )
    np.testing.assert_allclose(
        np.asarray(r.dense(permuted))[distinct_T], np.asarray(r.dense(routing))[:, order_E][distinct_T], rtol=1e-9
    )


@every_library
@given(case=cases(score=st.just("softmax")), shift=st.integers(-50, 50))
def test_softmax_does_not_see_a_shift(convert, case, shift):
    logits_TE, spec = case
    routing, shifted = select(convert(logits_TE), spec), select(convert(logits_TE + shift), spec)
    np.testing.assert_array_equal(np.asarray(shifted.indices_TK), np.asarray(routing.indices_TK))
    np.testing.assert_allclose(np.asarray(shifted.weights_TK), np.asarray(routing.weights_TK), rtol=1e-9, atol=1e-300)


@every_library
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(data=st.data())
def test_extreme_logits_give_a_routing_without_nan(convert, dtype, data):
    logits_TE, spec = data.draw(cases(EXTREMES.map(dtype), 8, dtype, score=st.sampled_from(["softmax", "sigmoid"])))
    logits_TE[:, :1] = np.maximum(logits_TE[:, :1], -3e38)  # one expert at least is not shut out
    routing = r.check(select(convert(logits_TE), spec))
    weights_TK = np.asarray(routing.weights_TK)
    assert np.isfinite(weights_TK).all()
    assert (weights_TK >= 0).all()
    if spec.score == "softmax" and spec.renormalize == 1:
        np.testing.assert_allclose(weights_TK.sum(1), spec.scale, rtol=1e-5)


@every_library
@given(case=cases(renormalize=st.just(None)))
def test_who_is_chosen_has_no_lower_score_than_who_is_not(convert, case):
    logits_TE, spec = case
    routing = select(convert(logits_TE), spec)
    for row, indices in zip(logits_TE, np.asarray(routing.indices_TK).tolist(), strict=True):
        others = [row[e] for e in range(len(row)) if e not in indices]
        floor = 0.0 if spec.score == "relu" and spec.order == "score-topk" else -np.inf
        assert len(set(indices)) == spec.k
        assert min(max(row[e], floor) for e in indices) >= max([max(x, floor) for x in others], default=-np.inf)


@every_library
@given(case=cases(renormalize=st.just(None), score=st.sampled_from(["softmax", "sigmoid"])))
def test_more_slots_begin_with_the_same(convert, case):
    logits_TE, spec = case
    fewer = select(convert(logits_TE), spec)
    whole = select(convert(logits_TE), dataclasses.replace(spec, k=logits_TE.shape[1]))
    np.testing.assert_array_equal(np.asarray(fewer.indices_TK), np.asarray(whole.indices_TK)[:, : spec.k])
    if spec.order == "score-topk":
        equal(fewer, r.Routing(whole.logits_TE, whole.weights_TK[:, : spec.k], whole.indices_TK[:, : spec.k]))


@every_library
@given(case=cases(score=st.sampled_from(["softmax", "sigmoid"]), renormalize=st.sampled_from([1, 2, 3])))
def test_renormalized_weights_have_the_norm_of_the_scale(convert, case):
    logits_TE, spec = case
    weights_TK = np.asarray(select(convert(logits_TE), spec).weights_TK)
    np.testing.assert_allclose((weights_TK**spec.renormalize).sum(1) ** (1 / spec.renormalize), spec.scale, rtol=1e-9)


@every_library
@given(case=cases(order=st.just("score-topk"), renormalize=st.just(None)), data=st.data())
def test_a_bias_brings_an_expert_in_at_its_own_weight(convert, case, data):
    logits_TE, spec = case
    E = logits_TE.shape[1]
    wanted = data.draw(st.integers(0, E - 1))
    bias_E = np.where(np.arange(E) == wanted, 1e3, 0.0)
    biased = select(convert(logits_TE), spec, convert(bias_E))
    assert (np.asarray(biased.indices_TK)[:, 0] == wanted).all()
    every = r.dense(select(convert(logits_TE), dataclasses.replace(spec, k=E)))
    np.testing.assert_allclose(np.asarray(biased.weights_TK)[:, 0], np.asarray(every)[:, wanted], rtol=1e-9)
    plain, same = select(convert(logits_TE), spec), select(convert(logits_TE), spec, convert(np.full(E, 0.25)))
    np.testing.assert_allclose(np.asarray(r.dense(same)), np.asarray(r.dense(plain)), rtol=1e-9)


@given(case=cases())
def test_the_logits_are_left_as_they_were_and_any_memory_order_will_do(case):
    logits_TE, spec = case
    for convert in LIBRARIES.values():
        given_TE = convert(np.asfortranarray(logits_TE))
        before_TE = np.array(given_TE)
        routing = select(given_TE, spec)
        np.testing.assert_array_equal(np.asarray(given_TE), before_TE)
        equal(routing, select(convert(logits_TE), spec))
