import hashlib
import os

import pytest

from mixtura.core import files
from mixtura.core.errors import OptionError
from mixtura.core.files import cache_folder, sha256, write_file, write_folder


class Killed(BaseException):
    """What no ``except Exception`` catches, as an interrupt."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def folder_of_a_killed_run(out, **options):
    with write_folder(out, **options) as partial:
        (partial / "one").write_text("1")
        raise Killed


def file_of_a_killed_run(path):
    with write_file(path) as partial:
        partial.write_text("half")
        raise Killed


def test_a_folder_is_whole(tmp_path):
    with write_folder(tmp_path / "a" / "out") as partial:
        (partial / "one").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "one").read_text() == "1"
    assert names(tmp_path / "a") == ["out"]


def test_a_folder_of_a_killed_run_is_not_there(tmp_path):
    with pytest.raises(Killed):
        folder_of_a_killed_run(tmp_path / "out")
    assert names(tmp_path) == []


def test_what_was_there_is_kept_until_the_new_one_is_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(Killed):
        folder_of_a_killed_run(out, overwrite=True)
    assert names(out) == ["old"]
    with write_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def replace(out):
    with write_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("new")


def test_where_the_system_cannot_exchange_folders_they_are_moved_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with monkeypatch.context() as patch:
        move = os.replace
        patch.setattr(os, "replace", lambda one, other: move(one, other) if ".partial-" not in str(one) else fail())
        with pytest.raises(OSError, match="no move"):
            replace(tmp_path / "out")
    assert names(tmp_path / "out") == ["old"]
    replace(tmp_path / "out")
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


def fail():
    raise OSError("no move")


def test_an_empty_folder_is_taken_and_others_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with write_folder(tmp_path / "empty") as partial:
        (partial / "one").write_text("1")
    assert names(tmp_path / "empty") == ["one"]
    (tmp_path / "file").write_text("")
    for taken in ("empty", "file"):
        with (
            pytest.raises(OptionError, match=f"out must be a new or empty folder, but .*{taken}"),
            write_folder(tmp_path / taken),
        ):
            pytest.fail("the block must not run")
    assert names(tmp_path) == ["empty", "file"]


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "a" / "x.json"
    with write_file(path) as partial:
        partial.write_text("1")
        assert partial.suffix == ".json"
        assert not path.exists()
    with pytest.raises(Killed):
        file_of_a_killed_run(path)
    assert path.read_text() == "1"
    assert names(path.parent) == ["x.json"]


def test_modes_are_those_of_the_user(tmp_path):
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    with write_file(tmp_path / "file") as partial:
        partial.write_text("")
    with write_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MIXTURA_CACHE", raising=False)
    assert cache_folder() == tmp_path / "mixtura"
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
