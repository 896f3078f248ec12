"""Files that are whole or not there: written beside, then renamed. Where the cache lies, and checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mixtura.core.errors import OptionError


def cache_folder() -> Path:
    """Where fetched things are: ``$MIXTURA_CACHE``, else ``$XDG_CACHE_HOME/mixtura``, else ``~/.cache/mixtura``."""
    own = os.environ.get("MIXTURA_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixtura"


def sha256(path: Path) -> str:
    """Checksum of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when the block ends well and is removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=path.suffix)
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_new_folder(out: Path) -> None:
    """Raise ``OptionError`` unless ``out`` is new or an empty folder; for long work, before it begins."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OptionError(f"out must be a new or empty folder, but {str(out)!r} exists")


@contextlib.contextmanager
def write_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``out``, which takes its place when the block ends well and is removed otherwise.

    Args:
        out: the folder to write; its parents are made.
        overwrite: whether a folder that is there and not empty may be replaced; it is kept until the new one is whole.

    Raises:
        OptionError: if ``out`` is a file, or a non-empty folder and overwrite is False.
    """
    out = Path(out)
    if not overwrite or out.is_file():
        check_new_folder(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=".partial-"))
    try:
        partial.chmod(0o777 & ~_umask())
        yield partial
        _swap(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(new: Path, out: Path) -> None:
    """Put ``new`` in the place of ``out``; what was there is deleted only once the new folder stands."""
    if not out.exists():
        os.replace(new, out)
        return
    old = Path(tempfile.mkdtemp(dir=out.parent, prefix=".replaced-"))
    os.replace(out, old)
    try:
        os.replace(new, out)
    except OSError:
        os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
