"""Files that are whole or not there: written beside, then renamed. Where the cache lies, and checksums.

Who writes has a folder of its own beside the target and holds a lock on it, which the system releases when the process
ends, however it ends. So the next one who writes there knows which left-overs are of dead processes, and removes them.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mixtura.core.errors import MixturaError, OptionError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and no left-over is removed
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".mixtura.partial-"
_REPLACED = ".mixtura.replaced-"
_LONGEST_NAME = 64  # bytes of a name that we or transformers write into a folder


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
    """A path to write to, which takes the place of ``path`` when the block ends well and is removed otherwise.

    Raises:
        OptionError: if ``path`` is a folder or a device, or not in UTF-8.
        OSError: if it cannot be written; also where safetensors raises an error of its own.
    """
    path = _real(path)
    if path.exists() and not path.is_file():
        raise OptionError(f"a file cannot be written to {str(path)!r}: something else is there")
    with _beside(path) as partial, os_errors():
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        _finish(partial, mode)
        os.replace(partial, path)


@contextlib.contextmanager
def write_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``out`` when the block ends well and is removed otherwise.

    Args:
        out: the folder to write; its parents are made.
        overwrite: whether a folder that is there and not empty may be replaced; it is kept until the new one is whole.

    Raises:
        OptionError: if ``out`` is a file, or a non-empty folder and overwrite is False, at the beginning or at the end.
        OSError: if it cannot be written; also where safetensors raises an error of its own.
    """
    out = _real(out)
    if not overwrite or out.is_file():
        check_new_folder(out)
    with _beside(out) as partial, os_errors():
        partial.mkdir()
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file() and not path.is_symlink():
                _finish(path, partial.stat().st_mode)
        _put(partial, out, overwrite=overwrite)


def check_new_folder(out: Path) -> None:
    """Raise ``OptionError`` unless ``out`` is a new or empty folder that can be written; for long work, before it
    begins.
    """
    out = _real(out)
    try:
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
        if not taken:
            _try_to_write(out)
    except OSError as error:
        raise OptionError(f"out cannot be written, {error.strerror}: {str(out)!r}") from error
    if taken:
        raise OptionError(f"out must be a new or empty folder, but {str(out)!r} exists")
    if os.path.ismount(out):
        raise OptionError(
            f"out must be a folder that can be renamed, but a disk is mounted at {str(out)!r}; write below it"
        )


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make a folder and be the only process that works in it, until the block ends or the process dies.

    An empty folder is removed at the end.

    Raises:
        MixturaError: if another process holds it.
    """
    with contextlib.ExitStack() as stack:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(_locked(folder))
                break
            except FileNotFoundError:
                continue  # the one who held it has just removed it
            except BlockingIOError:
                raise MixturaError(f"another process is at work in {str(folder)!r}; wait until it ends") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Raise as ``OSError`` what safetensors tells in words alone: "... (os error 28)"."""
    try:
        yield
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)", str(error))
        if told is None or isinstance(error, OSError):
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1]))) from error


def _real(path: Path) -> Path:
    """The place itself, where ``path`` may be a link to it; tokenizers and safetensors take no path but in UTF-8."""
    real = Path(os.path.realpath(path))
    try:
        str(real).encode()
    except UnicodeEncodeError:
        raise OptionError(f"a path to write to must be in UTF-8, got {os.fsencode(path)!r}") from None
    return real


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A path of the same name, in a folder beside that is this process's own and is removed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path.parent)
    with contextlib.ExitStack() as stack:
        own = _own_folder(path.parent, stack)
        try:
            yield own / path.name
        finally:
            shutil.rmtree(own, ignore_errors=True)


def _own_folder(parent: Path, stack: contextlib.ExitStack) -> Path:
    while True:
        own = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=parent))
        try:
            stack.enter_context(_locked(own))
            return own
        except (BlockingIOError, FileNotFoundError):
            continue  # before it was locked, another process took it for a left-over


def _remove_left_over(parent: Path) -> None:
    for folder in parent.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError), _locked(folder) as alone:
            if alone:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder; whether that keeps others away, which it does not on systems without locks.

    Raises:
        BlockingIOError: if another process holds it.
        FileNotFoundError: if it is not there, or was removed before it could be held.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        alone = _lock(descriptor)
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield alone
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems
        return False
    return True


def _try_to_write(out: Path) -> None:
    """Raise what would be raised when ``out`` is written in the end."""
    for path in (out, out.parent / f"{PARTIAL}12345678" / out.name / ("x" * _LONGEST_NAME)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)
    place = out.parent
    while not place.exists():
        place = place.parent
    os.rmdir(tempfile.mkdtemp(prefix=PARTIAL, dir=place))


def _finish(path: Path, mode: int) -> None:
    """Put a file on disk, readable for whom ``mode`` says; safetensors makes it readable for its owner alone."""
    path.chmod(path.stat().st_mode | (mode & 0o666))
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _put(new: Path, out: Path, *, overwrite: bool) -> None:
    """Put ``new`` in the place of ``out``; what was there stands until then."""
    try:
        os.rename(new, out)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    if not overwrite:
        check_new_folder(out)  # another process may have been first
    if not _exchange(new, out):
        old = Path(tempfile.mkdtemp(prefix=_REPLACED, dir=out.parent))
        os.replace(out, old)
        try:
            os.replace(new, out)
        except OSError:
            os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, if the system can (Linux): a process that is killed leaves either as it was."""
    rename = None if fcntl is None else getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
