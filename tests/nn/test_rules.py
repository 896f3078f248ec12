"""The table of who computes a call: what it takes is what computes, and no slower than what was measured beside it.

T tokens, D width, E experts, K slots a token, F expert width.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from mixtura.bench.layer import SHAPES
from mixtura.nn import Experts
from mixtura.nn.backends import automatic, rules
from mixtura.nn.backends.native import instructions
from mixtura.nn.backends.rules import RULES, Call, Rule, fitting

CALIBRATION = json.loads((Path(__file__).parents[2] / "benchmarks/calibration.json").read_text())
CALL = Call("cpu", torch.float32, training=False, traced=False, cast=False, instructions="avx2", slots=4.0)


@pytest.mark.parametrize(
    ("rule", "fits", "when"),
    [
        (Rule("sorted", ""), True, "any call"),
        (Rule("native", "", device="cuda"), False, "on cuda"),
        (Rule("native", "", dtypes=("bfloat16", "float32")), True, "bfloat16 or float32"),
        (Rule("native", "", dtypes=("bfloat16",)), False, "bfloat16"),
        (Rule("native", "", training=True), False, "with gradients"),
        (Rule("native", "", traced=False, cast=False), True, "no weights that autocast casts, not traced"),
        (Rule("native", "", instructions=("avx2", "avx512")), True, "by avx2 or avx512"),
        (Rule("native", "", instructions=("portable",)), False, "by portable"),
        (Rule("native", "", slots_from=4), True, "4 slots an expert or more"),
        (Rule("native", "", slots_below=4), False, "less than 4 slots an expert"),
    ],
)
def test_a_rule_fits_and_says_when(rule, fits, when):
    assert (rule.fits(CALL), rule.when) == (fits, when)


def test_a_call_that_is_traced_has_no_number_of_slots():
    assert not Rule("native", "", slots_from=0).fits(CALL._replace(traced=True))


def test_the_last_rule_takes_what_computes_everything():
    assert RULES[-1].takes == "sorted"
    assert RULES[-1].when == "any call"


@pytest.mark.parametrize("slots", [0.0, *rules.boundaries(), 1e9])
@pytest.mark.parametrize("training", [False, True])
def test_what_the_table_takes_computes(slots, training, monkeypatch):
    """For numbers of slots on both sides of every boundary."""
    asked = []
    for name in ("compute", "compute_grouped", "sorted_backend"):
        monkeypatch.setattr(automatic, name, lambda *_, name=name: asked.append(name))
    experts = Experts(1000, 4, 4).requires_grad_(training)
    S = min(10**6, math.ceil(1000 * slots))
    automatic.automatic_backend(experts, torch.zeros(S, 4), torch.zeros(S, 1, dtype=torch.long), torch.zeros(S, 1))
    isa = instructions()[0]
    first = fitting(CALL._replace(training=training, slots=S / 1000, instructions=isa))[0]
    assert asked == [{"native": "compute", "grouped": "compute_grouped", "sorted": "sorted_backend"}[first.takes]]


def losses():
    """How many times as long as the best the backend takes that the table takes, for each point."""
    for point in CALIBRATION["points"]:
        _, _, E, K = SHAPES[point["shape"]]
        work = {"training": point["work"] == "training", "slots": point["T"] * K / E}
        where = {name: point[name] for name in ("device", "instructions")}
        first = fitting(CALL._replace(dtype=getattr(torch, point["dtype"]), **where, **work))[0]
        yield point["seconds"][first.takes] / min(point["seconds"].values())


def test_the_table_takes_what_was_measured_to_be_the_fastest():
    """At no point is it slower by an eighth than the best, and at all points together by less than a hundredth."""
    lost = list(losses())
    assert max(lost) < 1.125
    assert sum(map(math.log, lost)) / len(lost) < math.log(1.01)
