"""A run that dies goes on to the same losses, wherever it died."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixtura.core.errors import MixturaError, OptionError
from mixtura.hf.callbacks import CompleteMark, is_complete, newest_checkpoint
from training.runs import model, recipe, run

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "out")


def die(out, where, step):
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(TESTS / "training" / "runs.py"), str(out), where, str(step)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return process.returncode, process.stderr if process.returncode > 0 else ""


@pytest.mark.parametrize(
    ("where", "step", "resumed_from"),
    [("at-step", 5, 4), ("in-weights", 4, 2), ("in-optimizer", 6, 4), ("before-mark", 2, 0)],
)
def test_killed_and_resumed(tmp_path, uninterrupted, where, step, resumed_from):
    out = tmp_path / "out"
    assert die(out, where, step) == (-signal.SIGKILL, "")
    assert not out.exists()
    result = run(out)
    assert result.resumed_from == resumed_from
    assert result.rows == uninterrupted.rows
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, uninterrupted.model.state_dict()[name]), name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_control_c_leaves_a_run_that_goes_on(tmp_path, uninterrupted):
    assert die(tmp_path / "out", "interrupt", 5) == (-signal.SIGINT, "")
    result = run(tmp_path / "out")
    assert result.resumed_from == 4
    assert result.rows == uninterrupted.rows


class Stop(Exception):
    """Ends a run from a callback."""


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that stopped after step 5 with complete checkpoints of steps 2 and 4."""
    with monkeypatch.context() as patch:
        patch.setattr(CompleteMark, "on_step_begin", lambda self, args, state, *_, **__: _stop(state), raising=False)
        with pytest.raises(Stop):
            run(tmp_path / "out")
    return tmp_path / "out.checkpoints"


def _stop(state):
    if state.global_step == 5:
        raise Stop


def test_what_is_incomplete_is_passed_over(stopped, tmp_path, uninterrupted):
    assert newest_checkpoint(stopped).name == "checkpoint-4"
    weights = stopped / "checkpoint-4" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    assert not is_complete(stopped / "checkpoint-4")
    assert newest_checkpoint(stopped).name == "checkpoint-2"
    result = run(tmp_path / "out")
    assert result.resumed_from == 2
    assert result.rows == uninterrupted.rows


def test_starting_over(stopped, tmp_path, uninterrupted):
    result = run(tmp_path / "out", resume=False)
    assert result.resumed_from == 0
    assert result.rows == uninterrupted.rows


def test_checkpoints_of_another_run_are_refused(stopped, tmp_path):
    with pytest.raises(OptionError, match=r"are of another run: train.steps was 8, is 9; pass resume=False"):
        run(tmp_path / "out", recipe(steps=9))
    with pytest.raises(OptionError, match="another run: seed was 3, is 4"):
        run(tmp_path / "out", dataclasses.replace(recipe(), seed=4))
    other = model()
    torch.nn.init.zeros_(other.transformer.ln_f.weight)
    with pytest.raises(OptionError, match="another run: frozen weights was"):
        run(tmp_path / "out", model_=other)
    assert newest_checkpoint(stopped).name == "checkpoint-4"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
        ),  # torch.save's words for it
    ],
)
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path, monkeypatch, uninterrupted, error):
    save = torch.save

    def full(value, path, **options):
        save(value, path, **options)
        if "checkpoint-4" in str(path):
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(
            MixturaError, match=r"the disk is full .*; checkpoint-2 is complete: free space and run again"
        ):
            run(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out.checkpoints").glob("checkpoint-*")) == ["checkpoint-2"]
    assert run(tmp_path / "out").rows == uninterrupted.rows


def test_killed_between_the_last_step_and_the_model(tmp_path, monkeypatch, uninterrupted):
    def broken(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mixtura.hf.save.save_model", broken)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    result = run(tmp_path / "out")
    assert result.resumed_from == 8
    assert result.rows == uninterrupted.rows


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path / "out")


def test_no_checkpoints_when_none_are_wanted(tmp_path, uninterrupted):
    result = run(tmp_path / "out", recipe(save_every=0))
    assert result.rows == uninterrupted.rows
