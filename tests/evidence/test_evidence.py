"""The harness: intervals, labs, the cache of runs, results and their staleness; every script in its smallest form."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from mixtura.cli.main import app
from mixtura.core.errors import FileFormatError, OptionError, UnknownNameError
from mixtura.evidence import (
    VERDICTS,
    Lab,
    Verdict,
    check,
    evidence,
    find_scripts,
    interval,
    load_script,
    read_results,
    run_script,
    scripts,
)
from mixtura.evidence.intervals import smallest_difference
from mixtura.evidence.results import read_result
from mixtura.evidence.runs import Runner
from mixtura.evidence.scripts import load_module

SCRIPT = '''"""A card."""
from pathlib import Path
from mixtura.evidence import Lab, Verdict, evidence

def train(*, seed, width, log):
    """Squares."""
    with open(log, "a") as file:
        file.write(f"{seed} {width}\\n")
    return {"loss": width * 10 + seed % 1000, "flops": 2.0 * width}

@evidence("toy", claim="wide loses", source="nowhere", figure="loss, lower is better", setting="numbers")
def measure(lab: Lab) -> Verdict:
    lab.tuned_arm("tuned", train, grid={"width": [3, 2]}, figure="loss", log=LOG)
    lab.arm("plain", train, width=5, log=LOG)
    gap = lab.difference("loss", "tuned", "plain")
    return Verdict("holds" if gap.high < 0 else "does not hold here", f"The gap is {gap}.")
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder with one script; returns its path, and a function that tells which runs were computed so far."""
    path, log = tmp_path / "evidence" / "toy.py", tmp_path / "log"
    path.parent.mkdir()
    path.write_text(SCRIPT.replace("LOG", repr(str(log))))
    monkeypatch.setattr(scripts, "folder", lambda: path.parent)
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path / "cache"))
    yield path, lambda: log.read_text().splitlines() if log.exists() else []
    sys.modules.pop("mixtura_evidence_toy", None)


def run_toy(**options):
    sys.modules.pop("mixtura_evidence_toy", None)
    return run_script("toy", jobs=1, say=lambda line: None, **options)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.3, 0.1, 0.2], [float(n % 7) for n in range(16)]])
def test_an_interval_is_students(values):
    found = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    assert found == pytest.approx((sum(values) / len(values), low, high), rel=1e-3)


def test_one_value_bounds_nothing_and_none_is_refused():
    assert interval([2.0]) == (2.0, -math.inf, math.inf)
    with pytest.raises(OptionError, match="at least one value"):
        interval([])


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_smallest_difference_is_found_in_four_of_five_tries(seeds):
    effect = smallest_difference(1.0, seeds)
    critical = stats.t.ppf(0.975, seeds - 1)
    power = stats.nct.sf(critical, seeds - 1, effect * math.sqrt(seeds))
    assert 0.72 < power < 0.85


def test_a_result_has_what_was_run(toy):
    result = run_toy()
    assert result.verdict == "holds"
    tuned, plain = result.arms
    assert tuned["config"]["width"] == 2
    assert tuned["tuned"] == [{"width": 3, "loss": 30.0}, {"width": 2, "loss": 20.0}]
    assert plain["figures"]["loss"]["seeds"] == [50.0, 51.0, 52.0]
    assert plain["cost"]["flops"] == 10.0
    assert result.differences[0]["mean"] == -30.0
    stored = read_results(toy[0].parent / "results")["toy"]
    assert json.loads(json.dumps(dataclasses.asdict(stored))) == json.loads(json.dumps(dataclasses.asdict(result)))


def test_runs_are_computed_once_until_their_code_changes(toy):
    path, computed = toy
    run_toy()
    assert len(computed()) == 2 + 3 + 3
    text = path.read_text()
    for change in (('"""A card."""', '"""Another."""'), ("The gap", "This gap"), ('"""Squares."""', '"""S."""')):
        path.write_text(path.read_text().replace(*change))
        run_toy()
        assert len(computed()) == 8, change
    path.write_text(text.replace("width * 10", "width * 11"))
    run_toy()
    assert len(computed()) == 16


def test_a_smoke_run_is_small_and_leaves_nothing(toy, tmp_path):
    result = run_toy(smoke=True)
    assert toy[1]() == ["0 3", "0 5"]
    assert result.seeds == (0,)
    assert not (toy[0].parent / "results").exists()
    assert not (tmp_path / "cache").exists()


def test_what_is_stale_is_named(toy):
    path, _ = toy
    result = run_toy()
    assert check(result, find_scripts()) == []
    path.write_text(path.read_text().replace("gap.high < 0", "gap.mean < 0"))
    assert check(result, find_scripts()) == ["its script has changed"]
    changed = dataclasses.replace(result, code={**result.code, "mixtura.core.routing": "0", "mixtura.gone": "1"})
    path.write_text(path.read_text().replace("gap.mean < 0", "gap.high < 0"))
    assert check(changed, find_scripts()) == ["mixtura.core.routing has changed", "mixtura.gone is gone"]
    assert check(result, {}) == ["its script is gone"]


def test_bad_results_are_refused(toy):
    run_toy()
    path = toy[0].parent / "results" / "toy.json"
    good = json.loads(path.read_text())
    for change in ({"verdict": "sure"}, {"sentence": ""}, {"seeds": [0, 1]}, {"more": 1}, {"arms": []}):
        path.write_text(json.dumps(good | change))
        with pytest.raises(FileFormatError, match=r"toy\.json"):
            read_result(path)


def test_bad_claims_are_refused(toy):
    with pytest.raises(OptionError, match="verdict must be one of 'holds'"):
        Verdict("maybe", "It may.")
    with pytest.raises(OptionError, match="needs a sentence"):
        Verdict("holds", " ")
    with pytest.raises(OptionError, match="seeds must be at least 3, got 2"):
        evidence("x", claim="", source="", figure="", setting="", seeds=2)
    with pytest.raises(UnknownNameError, match="did you mean 'toy'"):
        load_script("toi")


def test_arms_and_figures_are_named_in_errors():
    lab = Lab(Runner(None, jobs=0), [0])
    lab.arm("one", plain_figures)
    with pytest.raises(OptionError, match="arm 'one' was run already"):
        lab.arm("one", plain_figures)
    with pytest.raises(UnknownNameError, match="unknown arm 'two'"):
        lab.mean("loss", "two")
    with pytest.raises(UnknownNameError, match="unknown figure of arm 'one' 'los'; did you mean 'loss'"):
        lab.mean("los", "one")
    with pytest.raises(OptionError, match="gave no finite number for loss"):
        lab.arm("wrong", plain_figures, value=math.inf)
    with pytest.raises(OptionError, match="must be plain JSON"):
        lab.arm("set", plain_figures, value={1})


def plain_figures(*, seed, value=0.0):
    return {"loss": seed + value}


def made_up_voices(limit):
    rng = np.random.default_rng(0)
    frames = np.sort(rng.uniform(0.1, 3.0, (10 * limit, 16)), 1)
    return frames, np.sort(frames + rng.normal(0, 0.01, frames.shape), 1), np.repeat(np.arange(limit), 10)


def refused(source, folder):
    raise AssertionError(f"{source.package} would be fetched")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Nothing is fetched, nothing that was fetched is used; two scripts get other data in the place of theirs."""
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    monkeypatch.setattr(sys.modules["mixtura.data.fetch"], "_download_and_unpack", refused)
    voices, classes = (load_module(find_scripts()[key]) for key in ("voice-morphing-gmm", "gcd-ssgmm"))
    monkeypatch.setattr(voices, "pairs", made_up_voices)
    digits = classes.features("digits")
    monkeypatch.setattr(classes, "features", lambda data: digits)


@pytest.mark.parametrize("key", find_scripts())
def test_every_script_runs(key, offline):
    assert load_script(key).key == key
    result = run_script(key, smoke=True, say=lambda line: None)
    assert result.verdict in VERDICTS
    assert result.arms or result.verdict == "not testable here"


def test_committed_results_are_whole():
    known = read_results(scripts.folder() / "results")
    assert set(known) <= set(find_scripts())


def test_the_command_tells_what_to_give():
    runner = CliRunner()
    outcome = runner.invoke(app, ["evidence"])
    assert outcome.exit_code == 2
    assert "give one of KEY, --list, --all and --check" in outcome.output
    assert runner.invoke(app, ["evidence", "topk-softmx"]).exit_code == 2
    listed = runner.invoke(app, ["evidence", "--list", "--json"])
    assert {row["key"] for row in json.loads(listed.output)["evidence"]} == set(find_scripts())
