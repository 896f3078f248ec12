"""A full disk and a folder that cannot be written: one line, exit code 2, and nothing half-written."""

import contextlib
import errno
import os

import numpy as np
import pytest
import torch

from faults.conftest import read_only, small_files
from faults.places import fails, run, tree
from mixtura.core.errors import MixturaError, OptionError
from mixtura.core.files import check_new_folder, write_file, write_folder
from mixtura.hf.callbacks import newest_checkpoint
from mixtura.hf.save import save_model
from mixtura.traces.report import write_report
from mixtura.traces.trace import COLUMNS, Trace
from pico import pico
from training import runs

WRITERS = ("upcycle", "export", "train", "inspect", "inspect-trace")


def trace(rows=20_000):
    return Trace(
        **{name: np.zeros(rows, dtype) for name, dtype in COLUMNS.items()},
        meta={"layers": ["0"], "experts": [1], "domains": ["a"], "model": ""},
    )


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("size", [300, 9_000])  # the first or a later file does not fit
def test_a_full_disk_is_one_line_and_leaves_nothing(places, command, size):
    if command == "inspect-trace":
        size = 300  # a trace of two words is small
    before = tree(places.results)
    with small_files(size):
        result = run(*places.commands()[command])
    fails(result, "File too large")
    assert tree(places.results) == before


def test_a_full_disk_in_the_middle_of_training_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save, uninterrupted = torch.save, runs.run(tmp_path / "whole")

    def full_at_the_fourth(value, path, **options):
        with small_files(1_000 if "checkpoint-4" in str(path) else 1 << 40):
            save(value, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_at_the_fourth)
        with pytest.raises(MixturaError, match=r"the disk is full .*; checkpoint-2 is complete: free space"):
            runs.run(tmp_path / "out")
    assert newest_checkpoint(tmp_path / "out.checkpoints").name == "checkpoint-2"
    assert not (tmp_path / "out.checkpoints" / "checkpoint-4").exists()
    result = runs.run(tmp_path / "out")
    assert result.resumed_from == 2
    assert result.rows == uninterrupted.rows


def test_a_disk_that_is_full_at_the_very_end_keeps_the_last_step(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        with small_files(1_000):
            return save_model(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("mixtura.hf.save.save_model", full)
        with pytest.raises(MixturaError, match=r"the disk is full .*; checkpoint-8 is complete"):
            runs.run(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.checkpoints"]
    assert runs.run(tmp_path / "out").resumed_from == 8


def write_plainly(path):
    with write_file(path) as partial:
        partial.write_bytes(b"x" * 5_000)


def write_a_folder(path):
    with write_folder(path) as partial:
        (partial / "one").write_bytes(b"x" * 5_000)


@pytest.mark.parametrize(
    "write",
    [
        write_plainly,
        write_a_folder,
        lambda path: trace().save(path),
        lambda path: write_report(path, notes="x" * 5_000),
        lambda path: save_model(pico("llama"), path),
        lambda path: save_model(pico("llama"), path, overwrite=True),
    ],
    ids=["file", "folder", "trace", "report", "model", "overwrite"],
)
def test_every_writer_raises_an_oserror_with_its_number(tmp_path, write):
    with small_files(4_000), pytest.raises(OSError, match="File too large") as raised:
        write(tmp_path / "out")
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [*WRITERS, "demo"])
def test_a_read_only_folder_is_one_line(places, command):
    with read_only(places.results):
        result = run(*places.commands()[command])
    fails(result, "Permission denied")
    assert tree(places.results) == {}


@pytest.mark.parametrize("command", [*WRITERS, "demo"])
def test_a_path_below_a_file_is_one_line(places, command):
    before = tree(places.dense)
    result = run(*places.commands(places.dense / "config.json" / "out")[command])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert tree(places.dense) == before


def write_where_it_turns_read_only(out):
    with contextlib.ExitStack() as stack, write_folder(out) as partial:
        (partial / "one").write_text("1")
        stack.enter_context(read_only(out.parent))


def test_a_folder_that_turns_read_only_during_the_work(tmp_path):
    with pytest.raises(PermissionError):
        write_where_it_turns_read_only(tmp_path / "out")
    with write_folder(tmp_path / "out") as partial:
        (partial / "two").write_text("2")
    assert tree(tmp_path) == {"out": None, "out/two": b"2"}


@pytest.mark.parametrize("parents", ["", "a/b"])
def test_long_work_is_refused_before_it_begins(tmp_path, parents):
    out = tmp_path / "here" / parents / "out"
    (tmp_path / "here").mkdir()
    with read_only(tmp_path / "here"), pytest.raises(OptionError, match="out cannot be written, Permission denied"):
        check_new_folder(out)
    check_new_folder(out)
    assert list((tmp_path / "here").iterdir()) == []


def test_what_is_no_file_is_never_replaced_by_one(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OptionError, match="something else is there"), write_file(tmp_path / name):
            pytest.fail("the block must not run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_links_are_followed_and_stay(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("out", "file"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    with write_folder(tmp_path / "out") as partial:
        (partial / "one").write_text("1")
    with write_file(tmp_path / "file") as partial:
        partial.write_text("2")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "file").is_symlink()
    assert tree(tmp_path / "disk") == {"file": b"2", "out": None, "out/one": b"1"}


def test_weights_are_readable_for_whom_the_user_wants(tmp_path):
    (tmp_path / "plain").write_text("")
    save_model(pico("llama"), tmp_path / "out")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
