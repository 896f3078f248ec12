"""Every figure against a loop that can be read at a glance, and against what is known exactly."""

import math
from collections import Counter

import numpy as np
import pytest

from mixtura.core import OptionError
from mixtura.traces import Trace, metrics
from mixtura.traces.trace import REJECTED
from traces.traces import made, random


def slots(trace, layer):
    """(token number, expert, weight, domain, token id, position) of every filled slot of a real token, one by one."""
    found, token = [], -1
    for i in range(len(trace)):
        if trace.layers[trace.layer[i]] != layer:
            continue
        token += trace.slot[i] == 0
        if trace.valid[i] and trace.expert[i] < trace.num_experts(layer):
            found.append(
                (
                    token,
                    int(trace.expert[i]),
                    float(trace.weight[i]),
                    int(trace.domain[i]),
                    int(trace.token[i]),
                    int(trace.position[i]),
                )
            )
    return found


def information(pairs):
    n, joint = len(pairs), Counter(pairs)
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    total = sum(c / n * math.log(c * n / (left[a] * right[b])) for (a, b), c in joint.items())
    return total, -sum(c / n * math.log(c / n) for c in left.values())


@pytest.mark.parametrize("seed", range(5))
def test_load_importance_and_balance_equal_a_loop(seed):
    trace = random(seed=seed)
    for layer in trace.layers:
        found = slots(trace, layer)
        share = [sum(e == expert for _, e, *_ in found) / len(found) for expert in range(5)]
        weight = [sum(w for _, e, w, *_ in found if e == expert) for expert in range(5)]
        assert metrics.load(trace)[layer] == pytest.approx(share)
        assert metrics.importance(trace)[layer] == pytest.approx([w / sum(weight) for w in weight], rel=1e-5)
        balance = metrics.balance(trace)[layer]
        entropy = -sum(p * math.log(p) for p in share)
        assert balance == pytest.approx((max(share) * 5 - 1, entropy, math.exp(entropy), 0))


@pytest.mark.parametrize("seed", range(5))
def test_domain_load_equals_a_loop(seed):
    trace = random(seed=seed)
    for layer, share_NE in metrics.domain_load(trace).items():
        for n in range(3):
            mine = [e for _, e, _, domain, *_ in slots(trace, layer) if domain == n]
            assert share_NE[n] == pytest.approx([mine.count(e) / len(mine) for e in range(5)])


@pytest.mark.parametrize("by", ["domain", "token", "position"])
@pytest.mark.parametrize("seed", range(5))
def test_specialization_and_information_equal_a_loop(seed, by):
    trace = random(seed=seed, length=40)
    place = {"domain": 3, "token": 4, "position": 5}[by]
    for layer, value in metrics.specialization(trace, by).items():
        labeled = [(row[place], row[1]) for row in slots(trace, layer)]
        shared, entropy = information([pair for pair in labeled if pair[0] >= 0])
        assert value == pytest.approx(shared / entropy)
        assert metrics.information(trace, by)[layer] == pytest.approx(shared)


def test_an_expert_for_each_domain_is_full_specialization():
    domain_T = np.repeat([0, 1], 50)
    trace = made(domain_T[:, None], E=3, domain_T=domain_T)
    assert metrics.specialization(trace)["0"] == pytest.approx(1)
    assert metrics.mutual_information(np.array([[50, 0, 0], [0, 50, 0]])) == pytest.approx(math.log(2))
    assert metrics.domain_load(trace)["0"].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert metrics.balance(trace)["0"] == pytest.approx((0.5, math.log(2), 2, 1))


def test_independent_labels_are_no_specialization():
    everything = np.array([(e, d, t) for e in range(4) for d in range(2) for t in range(3)])
    trace = made(everything[:, :1], E=4, domain_T=everything[:, 1], token_T=everything[:, 2])
    for by in ("domain", "token"):
        assert metrics.specialization(trace, by)["0"] == pytest.approx(0, abs=1e-12)
    joint = np.outer([1, 2, 3], [4, 5])
    assert metrics.mutual_information(joint) == pytest.approx(0, abs=1e-12)


def test_chance_is_what_a_router_that_knows_nothing_gets():
    generator = np.random.default_rng(0)
    domain_T = generator.integers(0, 2, 4000)
    blind = made(generator.integers(0, 4, (4000, 1)), E=4, domain_T=domain_T)
    knowing = made(domain_T[:, None], E=4, domain_T=domain_T)
    for trace in (blind, knowing):
        assert metrics.chance(trace)["0"] < 0.003
    assert metrics.specialization(blind)["0"] < 0.003
    assert metrics.chance(blind) == metrics.chance(blind)


def test_chance_shuffles_tokens_not_slots():
    trace = made([[0, 1], [2, 3]], E=4, token_T=[5, 6])
    assert metrics.chance(trace, "token")["0"] == pytest.approx(1)


def test_nothing_to_tell_is_zero_not_nan():
    for trace in (made(np.zeros((0, 2), int), E=4), made([[4, 4]], E=4), made([[0, 1]], E=4, domain_T=[-1])):
        assert metrics.specialization(trace) == metrics.chance(trace) == {"0": 0.0}
        assert np.isfinite(metrics.domain_load(trace)["0"]).all()
    assert metrics.balance(made([[4, 4]], E=4))["0"].violation == 0


def test_another_label_is_refused():
    with pytest.raises(OptionError, match="'domain', 'token', 'position', got 'layer'"):
        metrics.specialization(random(), "layer")


def test_padding_changes_nothing():
    trace = random()
    for figure in (metrics.load, metrics.importance, metrics.domain_load):
        for layer, value in figure(trace).items():
            assert np.array_equal(value, figure(trace.counted())[layer])


def tokens(trace, layer):
    """Dense weights and set of experts of every real token, by sequence and position; the last record counts."""
    found = {}
    for i in np.argsort(trace.call, kind="stable"):
        if trace.layers[trace.layer[i]] == layer and trace.valid[i] and trace.phase[i] != REJECTED:
            place = (int(trace.sequence[i]), int(trace.position[i]))
            if trace.slot[i] == 0:
                found[place] = {}
            if trace.expert[i] < trace.num_experts(layer):
                found[place][int(trace.expert[i])] = float(trace.weight[i])
    return found


@pytest.mark.parametrize("seed", range(5))
def test_co_activation_equals_a_loop(seed):
    trace = random(seed=seed, K=3)
    for layer, share_EE in metrics.co_activation(trace).items():
        sets = list(tokens(trace, layer).values())
        for one in range(5):
            for other in range(5):
                both = sum(one in found and other in found for found in sets)
                assert share_EE[one, other] == pytest.approx(both / len(sets))


@pytest.mark.parametrize("seed", range(5))
def test_agreement_equals_a_loop(seed):
    """Of two traces whose tokens overlap in part, come in another order, and are there twice."""
    one, other = random(seed=seed, length=40), random(seed=seed + 10, length=40)
    keep = other.sequence < 4
    other = Trace.concat([other, random(seed=seed + 20, length=40, T=40)])
    other.sequence[-160:] = 1
    other = other.select(np.append(keep, np.ones(160, bool)))
    for layer, found in metrics.agreement(one, other).items():
        ours, theirs = tokens(one, layer), tokens(other, layer)
        both = sorted(ours.keys() & theirs.keys())
        equal = jaccard = weighted = 0
        for place in both:
            a, b = ours[place], theirs[place]
            equal += a.keys() == b.keys()
            jaccard += len(a.keys() & b.keys()) / len(a.keys() | b.keys()) if a or b else 1
            pairs = [(a.get(e, 0), b.get(e, 0)) for e in range(5)]
            weighted += sum(map(min, pairs)) / sum(map(max, pairs)) if a or b else 1
        n = len(both)
        assert 50 < n < len(ours)
        assert found == pytest.approx((n, equal / n, jaccard / n, weighted / n))


def test_a_trace_agrees_with_itself_and_not_with_another_model():
    trace = random(length=40)
    for found in metrics.agreement(trace, trace).values():
        assert found[1:] == (1, 1, 1)
    disjoint = [made([[e, e + 1]], E=4) for e in (0, 2)]
    assert metrics.agreement(*disjoint)["0"] == (1, 0, 0, 0)
    half = [made([[0, e]], E=4, weights_TK=[[0.75, 0.25]]) for e in (1, 2)]
    assert metrics.agreement(*half)["0"] == pytest.approx((1, 0, 1 / 3, 0.75 / 1.25))
    with pytest.raises(OptionError, match="same layers"):
        metrics.agreement(trace, random(E=6))
    with pytest.raises(OptionError, match="in common"):
        metrics.agreement(trace, trace.select(np.zeros(0, int)))


@pytest.mark.parametrize("seed", range(5))
def test_drop_rate_equals_a_loop(seed):
    trace = random(seed=seed, length=40)
    trace.valid[trace.position == 7] = False
    for layer, rate_P in metrics.drop_rate(trace).items():
        assert len(rate_P) == 40
        for position in range(40):
            experts = [
                int(trace.expert[i])
                for i in range(len(trace))
                if trace.layers[trace.layer[i]] == layer and trace.valid[i] and trace.position[i] == position
            ]
            if position == 7:
                assert math.isnan(rate_P[position])
            else:
                assert rate_P[position] == pytest.approx(experts.count(5) / len(experts))


def test_a_capacity_that_runs_out_is_seen():
    trace = made(np.repeat([[0, 1], [0, 4], [4, 4]], 2, axis=0), E=4)
    assert metrics.drop_rate(trace)["0"].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_a_position_that_decides_the_expert():
    trace = made([[p] for p in range(4)] * 5, E=4)
    trace.position[:] = np.tile(np.arange(4), 5)
    assert metrics.specialization(trace, "position")["0"] == pytest.approx(1)
    assert metrics.information(trace, "position")["0"] == pytest.approx(math.log(4))


def test_of_nothing_there_is_nothing():
    empty = Trace.empty(layers=["0"], experts=[4])
    assert metrics.information(empty, "position") == {"0": 0.0}
    assert metrics.co_activation(empty)["0"].tolist() == np.zeros((4, 4)).tolist()
    assert metrics.drop_rate(empty)["0"].shape == (0,)
    assert len(empty.final()) == 0
