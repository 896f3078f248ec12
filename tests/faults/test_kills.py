"""Processes that die at any moment lose nothing; ``kills.py`` says what is looked at."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mixtura.core.files as files
from mixtura.core.files import PARTIAL, write_file, write_folder

KILLS = Path(__file__).with_name("kills.py")


def test_twenty_random_kills_over_train_and_save_lose_nothing():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(KILLS), "--kills", "20", "--seed", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["kills"], result["lost"]) == (20, 0)
    assert result["runs"] >= 1
    assert sum(result["by_phase"].values()) == 20
    assert len(result["by_phase"]) >= 3


class Interrupt:
    """Raises KeyboardInterrupt when the n-th line of ``files.py`` is about to run, as Ctrl-C may at any line."""

    def __init__(self, line):
        self.left = line

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)

    def __exit__(self, *_):
        sys.settrace(None)


def write_new_folder(place):
    with write_folder(place / "out") as partial:
        (partial / "one").write_text("new")


def replace_folder(place):
    with write_folder(place / "out", overwrite=True) as partial:
        (partial / "one").write_text("new")


def write_new_file(place):
    with write_file(place / "out") as partial:
        partial.write_text("new")


def contents(path):
    if not path.exists():
        return None
    return path.read_text() if path.is_file() else {file.name: file.read_text() for file in path.iterdir()}


def as_if_dead():
    """Close the locks that an interrupt left open between two lines, as the end of the process does."""
    for number in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):
            if PARTIAL in os.readlink(f"/dev/fd/{number}"):
                os.close(int(number))


def prepared(place, old):
    place.mkdir()
    if isinstance(old, dict):
        (place / "out").mkdir()
        (place / "out" / "one").write_text(old["one"])
    elif old is not None:
        (place / "out").write_text(old)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files that are open when it strikes
@pytest.mark.parametrize(
    ("write", "old", "new"),
    [
        (write_new_folder, None, {"one": "new"}),
        (replace_folder, {"one": "old"}, {"one": "new"}),
        (write_new_file, None, "new"),
        (write_new_file, "old", "new"),
    ],
    ids=["new-folder", "folder", "new-file", "file"],
)
def test_an_interrupt_at_any_line_leaves_the_old_or_the_new(tmp_path, write, old, new):
    line, seen = 0, set()
    while True:
        line += 1
        place = tmp_path / str(line)
        prepared(place, old)
        try:
            with Interrupt(line):
                write(place)
        except KeyboardInterrupt:
            found = contents(place / "out")
            assert found in (old, new), line
            seen.add(str(found))
            as_if_dead()
            with write_file(place / "next") as partial:
                partial.write_text("")
            assert {path.name for path in place.iterdir()} <= {"out", "next"}, line
            continue
        break
    assert contents(place / "out") == new
    assert [path.name for path in place.iterdir()] == ["out"]
    assert line > 30
    assert seen == {str(old), str(new)}
