"""A corpus: documents by domain, some of them held out by what they contain and not by where they lie."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from mixtura.core.errors import FetchError, FileFormatError, OptionError, unknown_name
from mixtura.data.domains import DOMAINS, SHORTEST


def load_domain(name: str) -> list[str]:
    """Documents of a domain, each once, in an order that is the same on every run.

    Args:
        name: one of ``DOMAINS``, or ``NAME=PATH`` for text of one's own: a folder of .txt files, each a document; a
            .jsonl whose lines have "text"; or one text file, which is cut at empty lines.

    Raises:
        UnknownNameError: with the nearest name.
        FetchError: if its package cannot be had.
        FileFormatError: if a file cannot be read; of a .jsonl with the number of the line.
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
    try:
        if path.suffix == ".jsonl":
            texts = [_text(line, path, n) for n, line in enumerate(_utf8(path).split("\n"), 1) if line.strip()]
        elif path.is_dir():
            texts = [_utf8(file) for file in sorted(path.rglob("*.txt"))]
        else:
            texts = _cut(_utf8(path))
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"text {str(path)!r} cannot be read: {error}") from None
    return [text for text in texts if text.strip()]


def _utf8(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _text(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()  # also refuses half of a surrogate pair, which no tokenizer takes
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileFormatError(f'{str(path)!r}: line {number} is no JSON object with "text"') from None
    return str(text)


def _cut(text: str) -> list[str]:
    """Documents of one text: whole paragraphs until a document is long enough; a short rest joins the last one."""
    documents = [""]
    for paragraph in re.split(r"(?<=\n)(?=[ \t]*\n)", text):
        if len(documents[-1]) >= SHORTEST:
            documents.append("")
        documents[-1] += paragraph
    rest = documents.pop() if len(documents[-1].strip()) < SHORTEST and len(documents) > 1 else ""
    documents[-1] += rest
    return [document.strip("\n") for document in documents]


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
        if on_missing not in ("skip", "raise"):
            raise OptionError(f"on_missing must be 'skip' or 'raise', got {on_missing!r}")
        texts: dict[str, list[str]] = {}
        skipped: dict[str, str] = {}
        for name in dict.fromkeys(domains):
            label = name.partition("=")[0]
            if label in texts:
                raise OptionError(f"domain {label!r} is given twice")
            try:
                texts[label] = load_domain(name)
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
        """Hold out the documents whose hash is smallest: a document stays on its side when others come or go.

        Args:
            texts: documents by domain; what is there twice counts once.
            held_out: share of the documents; at least one of each domain is held out, and at least one is not.
            skipped: why a domain is not there.

        Raises:
            OptionError: if held_out does not lie between 0 and 1, or a domain has fewer than two documents.
        """
        if not 0 < held_out < 1:
            raise OptionError(f"held_out must lie between 0 and 1, got {held_out}")
        train, held = {}, {}
        for name, given in texts.items():
            documents = list(dict.fromkeys(given))
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
