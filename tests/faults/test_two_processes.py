"""Two that write to one place at once: one of them wins or is told, and what stands there is whole."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from mixtura.core import files
from mixtura.core.errors import MixturaError, OptionError
from mixtura.core.files import PARTIAL, hold_folder, write_file, write_folder
from mixtura.hf.callbacks import CompleteMark
from training import runs

WRITE_AND_WAIT = """
import sys
from pathlib import Path
from mixtura.core.files import hold_folder, write_file, write_folder
kind, path = sys.argv[1], Path(sys.argv[2])
with {"file": write_file, "folder": write_folder, "hold": hold_folder}[kind](path) as partial:
    print(partial, flush=True)
    sys.stdin.readline()
    if kind == "folder":
        (partial / "one").write_text("first")
    if kind == "file":
        partial.write_text("first")
"""


@pytest.fixture
def other(tmp_path):
    """Start another process that is in the middle of writing to a path."""
    processes = []

    def start(kind, path):
        command = [sys.executable, "-c", WRITE_AND_WAIT, kind, str(path)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        process.said = process.stdout.readline().strip()
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write(path, text="second", **options):
    with write_folder(path, **options) as partial:
        (partial / "one").write_text(text)


def test_the_second_to_finish_is_told_and_the_first_stays(tmp_path, other):
    first = other("folder", tmp_path / "out")

    def write_while_the_first_finishes():
        with write_folder(tmp_path / "out") as partial:
            (partial / "two").write_text("second")
            first.communicate("\n")

    with pytest.raises(OptionError, match="out must be a new or empty folder, but"):
        write_while_the_first_finishes()
    assert first.returncode == 0
    assert (tmp_path / "out" / "one").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_who_may_overwrite_takes_the_place_of_the_whole(tmp_path, other):
    first = other("folder", tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    _, error = first.communicate("\n")
    assert first.returncode == 1
    assert "OptionError: out must be a new or empty folder" in error
    assert (tmp_path / "out" / "one").read_text() == "second"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_living_process_writes_is_not_taken_for_a_left_over(tmp_path, other, kind):
    first = other(kind, tmp_path / "out")
    write(tmp_path / "beside")
    write(tmp_path / "beside", "third", overwrite=True)
    assert os.path.isdir(os.path.dirname(first.said))
    first.communicate("\n")
    assert first.returncode == 0
    assert names(tmp_path) == ["beside", "out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_dead_process_has_left_goes_with_the_next_write(tmp_path, other, kind):
    first = other(kind, tmp_path / "out")
    first.send_signal(signal.SIGKILL)
    first.wait()
    (left,) = names(tmp_path)
    assert left.startswith(PARTIAL)
    with write_file(tmp_path / "next") as partial:
        partial.write_text("")
    assert names(tmp_path) == ["next"]


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path, other):
    first = other("hold", tmp_path / "held")
    with pytest.raises(MixturaError, match="another process is at work in"), hold_folder(tmp_path / "held"):
        pytest.fail("the block must not run")
    first.kill()
    first.wait()
    with hold_folder(tmp_path / "held"):
        assert names(tmp_path) == ["held"]
    assert names(tmp_path) == []


def before_the_first_lock(monkeypatch, act):
    """Do something when a folder has been opened and is about to be locked for the first time."""
    lock, done = files._lock, []

    def late(descriptor):
        if not done:
            done.append(True)
            act()
        return lock(descriptor)

    monkeypatch.setattr(files, "_lock", late)


def test_a_folder_that_is_replaced_before_it_is_held_is_held_all_the_same(tmp_path, monkeypatch):
    held = tmp_path / "held"

    def replace():
        held.rmdir()
        held.mkdir()

    before_the_first_lock(monkeypatch, replace)
    with (
        hold_folder(held),
        pytest.raises(MixturaError, match="another process is at work in"),
        hold_folder(held),
    ):
        pytest.fail("the block must not run")


def test_a_folder_that_is_taken_for_a_left_over_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    before_the_first_lock(monkeypatch, lambda: next(tmp_path.glob(f"{PARTIAL}*")).rmdir())
    write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_second_run_of_training_is_refused_before_it_touches_the_first(tmp_path, monkeypatch):
    def second_run(self, args, state, *_, **__):
        if state.global_step != 5:
            return
        before = names(tmp_path / "out.checkpoints")
        with pytest.raises(MixturaError, match="another process is at work in"):
            runs.run(tmp_path / "out", resume=False)
        assert names(tmp_path / "out.checkpoints") == before
        asked.append(before)

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(CompleteMark, "on_step_begin", second_run, raising=False)
        result = runs.run(tmp_path / "out")
    assert asked == [["checkpoint-2", "checkpoint-4", "run.json"]]
    assert len(result.rows) == 8
    assert names(tmp_path) == ["out"]


def test_two_runs_at_once_leave_one_whole_model(tmp_path, other):
    other("hold", tmp_path / "out.checkpoints")
    with pytest.raises(MixturaError, match="another process is at work"):
        runs.run(tmp_path / "out")
    assert names(tmp_path) == ["out.checkpoints"]


def test_many_writers_of_one_folder_leave_one_whole_result(tmp_path):
    """Each writes two files that must belong together, over and over, while others replace them."""
    failed = []

    def over_and_over(number):
        try:
            for turn in range(20):
                with write_folder(tmp_path / "out", overwrite=True) as partial:
                    for name in ("one", "two"):
                        (partial / name).write_text(f"{number} {turn}")
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=over_and_over, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert (tmp_path / "out" / "one").read_text() == (tmp_path / "out" / "two").read_text()
    assert names(tmp_path) == ["out"]


def test_checkpoints_of_somebody_else_are_left_alone(tmp_path):
    mine = tmp_path / "out.checkpoints" / "checkpoint-500"
    mine.mkdir(parents=True)
    (mine / "model.safetensors").write_text("precious")
    for resume in (True, False):
        with pytest.raises(OptionError, match="holds checkpoints that no run of mixtura has written"):
            runs.run(tmp_path / "out", resume=resume)
    assert (mine / "model.safetensors").read_text() == "precious"


def test_other_things_in_the_folder_of_checkpoints_stay(tmp_path):
    notes = tmp_path / "out.checkpoints" / "checkpoint-of-mine" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("keep")
    runs.run(tmp_path / "out", runs.recipe(steps=2), resume=False)
    assert notes.read_text() == "keep"
    assert names(tmp_path / "out.checkpoints") == ["checkpoint-of-mine"]
