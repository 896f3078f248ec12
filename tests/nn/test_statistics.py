"""Which load f a balance loss sees, and what a split of the step does to it.

T tokens, E experts, K slots a token.
"""

import pytest
import torch

from mixtura.core import registry
from mixtura.core.routing import counts
from mixtura.core.selection import SelectionSpec, select
from mixtura.nn.balance.global_batch_lbl import RunningLoad
from mixtura.nn.balance.load_balancing import load_balancing_loss
from mixtura.nn.balance.micro_batch_load import MicroBatchLoad
from mixtura.nn.balance.previous_step_load import PreviousStepLoad

STATISTICS = registry.methods("statistic")
T, E, K = 128, 8, 2


def routed(seed, tilt=1.0):
    """Domains that prefer experts: logits of a token lean to the expert of its quarter."""
    logits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    logits_TE[torch.arange(T), torch.arange(T) // (T // 4)] += tilt
    return select(logits_TE, SelectionSpec(k=K))


def step_loss(statistic, routing, parts):
    """Loss of a step split into equal parts, and its end."""
    total, size = 0.0, T // parts
    for first in range(0, T, size):
        part = type(routing)(*(x[first : first + size] for x in routing))
        total += load_balancing_loss(part, load_E=statistic.observe("0", counts(part))).item() / parts
    statistic.end_step({"0": counts(routing)})
    return total


@pytest.mark.parametrize("row", STATISTICS, ids=lambda row: row.key)
def test_is_a_load(row):
    statistic = row.build()
    for seed in range(3):
        load_E = statistic.observe("0", counts(routed(seed)))
        assert load_E.dtype == torch.float32
        assert load_E.sum().item() == pytest.approx(1)
        assert (load_E >= 0).all()
        statistic.end_step({"0": counts(routed(seed))})


@pytest.mark.parametrize("row", STATISTICS, ids=lambda row: row.key)
def test_a_call_without_tokens_is_harmless(row):
    load_E = row.build().observe("0", torch.zeros(E, dtype=torch.int64))
    assert load_E.isfinite().all()


@pytest.mark.parametrize("row", STATISTICS, ids=lambda row: row.key)
def test_layers_are_kept_apart(row):
    one, both = row.build(), row.build()
    expected = one.observe("0", counts(routed(0)))
    both.observe("1", counts(routed(1)))
    assert torch.equal(both.observe("0", counts(routed(0))), expected)


@pytest.mark.parametrize("row", STATISTICS, ids=lambda row: row.key)
def test_a_resumed_statistic_goes_on(row):
    one, other = row.build(), row.build()
    one.observe("0", counts(routed(0)))
    one.end_step({"0": counts(routed(0))})
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.observe("0", counts(routed(1))), other.observe("0", counts(routed(1))))


def test_one_micro_batch_a_step_is_the_same_in_the_buffer():
    """The paper's n = 1; also in a second step, since the buffer is emptied."""
    running, micro = RunningLoad(), MicroBatchLoad()
    for seed in range(2):
        assert step_loss(running, routed(seed), 1) == step_loss(micro, routed(seed), 1)


def test_the_last_micro_batch_of_the_buffer_sees_the_whole_step():
    running, whole = RunningLoad(), routed(0)
    for first in range(0, T, 32):
        load_E = running.observe("0", counts(type(whole)(*(x[first : first + 32] for x in whole))))
    torch.testing.assert_close(load_E, counts(whole) / counts(whole).sum())


def test_the_previous_step_is_uniform_at_first_and_then_exact():
    statistic = PreviousStepLoad()
    assert torch.equal(statistic.observe("0", counts(routed(0))), torch.full((E,), 1 / E))
    statistic.end_step({"0": counts(routed(0))})
    torch.testing.assert_close(statistic.observe("0", counts(routed(1))), counts(routed(0)) / counts(routed(0)).sum())
    statistic.end_step({"0": torch.zeros(E, dtype=torch.int64)})
    torch.testing.assert_close(statistic.observe("0", counts(routed(1))), counts(routed(0)) / counts(routed(0)).sum())


def deviations(parts):
    """How far each statistic's loss of a split step is from that of the whole one, on average over ten steps."""
    result = {}
    for row in STATISTICS:
        split, whole = row.build(), row.build()
        pairs = [(step_loss(split, routed(seed), parts), step_loss(whole, routed(seed), 1)) for seed in range(10)]
        result[row.key] = sum(abs(a / b - 1) for a, b in pairs) / len(pairs)
    return result


def test_how_much_a_split_into_four_changes_the_loss():
    """The numbers that the card of global-batch-lbl gives."""
    by = deviations(4)
    assert by["previous-step-load"] < 1e-6
    assert by["previous-step-load"] < by["global-batch-lbl"] < by["micro-batch-load"]
    assert by["global-batch-lbl"] == pytest.approx(0.059, rel=0.02)
    assert by["micro-batch-load"] == pytest.approx(0.179, rel=0.02)
