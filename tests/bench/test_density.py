"""The benchmark of Gaussian mixtures on tiny tables: both do the same iterations, and an iteration is what is told."""

import numpy as np
import pytest

from mixtura.bench import density as density_module
from mixtura.bench.density import FAMILIES, Iterations, Start, density
from mixtura.bench.measuring import CLOCKS, Watch


@pytest.mark.parametrize("kind", FAMILIES)
def test_both_take_the_same_steps(kind, monkeypatch):
    monkeypatch.setattr(density_module, "ROWS", 400)
    wanted = f"{kind}/d2/k2/float64"
    versions = {}
    (case,) = density(Watch(patience=0), {}, versions, wanted=lambda name: name == wanted, rounds=1)
    assert versions["scikit-learn"]
    assert {row["who"] for row in case.rows()} == {"mixtura", "scikit-learn"}
    assert case.errors["mixtura"] < 1e-9
    assert not case.outcome.failed


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_start_is_the_same_mixture_for_all(dtype):
    start = Start(300, 3, 2, "full", dtype)
    assert start.X.dtype == dtype
    np.testing.assert_allclose(start.ours(1).lower_bound_, start.sklearn(1).lower_bound_, rtol=1e-5)


def test_seconds_are_those_of_an_iteration(monkeypatch):
    clock = iter(range(1000))
    passed = []
    monkeypatch.setitem(CLOCKS, "wall", lambda: next(clock) + sum(passed))
    contestant = Iterations("one", lambda iterations: passed.append(5 + 2 * iterations), 10)
    assert contestant.run(3) == [2.0, 2.0, 2.0]
