"""The benchmark of Gaussian mixtures on tiny tables: all do the same iterations, and an iteration is what is told."""

import sys
from pathlib import Path

import numpy as np
import pytest

from mixtura.bench import density as density_module
from mixtura.bench import peers
from mixtura.bench.density import FAMILIES, Iterations, Start, density
from mixtura.bench.measuring import Watch

PEER = """
import os, sys
sys.path.insert(0, {loop!r})
import numpy as np
from loop import serve
from mixtura.density import GaussianMixture

class Mixtures:
    def load(self, threads):
        return {{"versions": {{"pomegranate": "0"}}}}

    def case(self, folder, kind, iterations):
        if kind == "tied":
            raise ValueError("it has no tied covariances")
        self.kind = kind
        names = ("X", "weights", "means", "covariances")
        self.X, *self.start = [np.load(os.path.join(folder, name + ".npy")) for name in names]
        self.calls = {{str(n): lambda n=n: self.fit(n) for n in iterations}}

    def fit(self, iterations):
        mixture = GaussianMixture.from_parameters(*self.start, covariance=self.kind)
        return mixture.set_params(warm_start=True, max_iter=iterations, tol=0).fit(self.X)

    def output(self, iterations, path):
        np.save(path, self.fit(iterations).means_ + (self.kind == "diag"))

serve(Mixtures())
"""


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


def test_a_peer_takes_part_if_it_can_and_its_means_agree(tmp_path, monkeypatch):
    loop = str(Path(peers.__file__).with_name("workers"))
    (tmp_path / "pomegranate_mixture.py").write_text(PEER.format(loop=loop))
    monkeypatch.setattr(peers, "_WORKERS", tmp_path)
    monkeypatch.setattr(density_module, "ROWS", 400)
    there, versions = {"pomegranate": Path(sys.executable)}, {}
    cases = density(Watch(patience=0), there, versions, wanted=lambda name: name.endswith("/d2/k2/float64"), rounds=1)
    full, tied, diag, spherical = cases
    assert versions["pomegranate"] == "0"
    for case in (full, spherical):
        assert {row["who"] for row in case.rows()} == {"mixtura", "scikit-learn", "pomegranate"}
        assert case.errors["pomegranate"] < 1e-9
    assert tied.left_out == {"pomegranate": "ValueError: it has no tied covariances"}
    assert diag.left_out["pomegranate"].startswith("its means are off by ")
    assert {row["who"] for row in diag.rows()} == {"mixtura", "scikit-learn"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_start_is_the_same_mixture_for_all(dtype):
    start = Start(300, 3, 2, "full", dtype)
    assert start.X.dtype == dtype
    np.testing.assert_allclose(start.ours(1).lower_bound_, start.sklearn(1).lower_bound_, rtol=1e-5)


class Takes:
    """A contestant of a fit that takes 5 seconds, and 2 for each iteration."""

    who = ""

    def __init__(self, iterations):
        self.seconds = 5.0 + 2 * iterations

    def run(self, times, clock):
        assert clock == "processor"
        return [self.seconds] * times


def test_seconds_are_those_of_an_iteration():
    assert Iterations("one", Takes, 10).run(3, "processor") == [2.0, 2.0, 2.0]
