"""Blocks of tokens from several domains in given proportions: the same for the same arguments, at any index.

N blocks, L tokens of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mixtura.core.errors import OptionError, unknown_name

Tokenize = Callable[[str], list[int]]
_LONGEST_TOKEN = 16  # characters a token may take on average before a piece of text is too short for a block


class MixedBlocks(Sequence[dict[str, Any]]):
    """N blocks; block i is drawn from domain ``domains[order[i]]``.

    Every document gives one block, at a line where one may begin, before any gives a second, so that few blocks come
    from many documents. Of each domain there are as many blocks as its proportion says, to the block, spread evenly
    and then shuffled.

    Args:
        documents: by domain.
        proportions: by domain; need not sum to 1.
        total: N.
        length: L.
        tokenize: from text to token ids, without special tokens.
        seed: of the order and of where blocks begin.

    Raises:
        UnknownNameError: if a proportion names no domain.
        OptionError: if a proportion is negative or not finite, all are 0, or a domain has no document of L tokens.
    """

    def __init__(
        self,
        documents: Mapping[str, Sequence[str]],
        proportions: Mapping[str, float],
        *,
        total: int,
        length: int,
        tokenize: Tokenize,
        seed: int = 0,
    ) -> None:
        if total < 1 or length < 2:
            raise OptionError(f"total must be at least 1 and length at least 2, got {total} and {length}")
        counts = block_counts(proportions, total)
        for name in proportions:
            if name not in documents:
                raise unknown_name("domain", name, documents)
        self.domains = [name for name, count in counts.items() if count]
        blocks = [
            _draw(documents[name], counts[name], length, tokenize, np.random.default_rng([seed, *name.encode()]), name)
            for name in self.domains
        ]
        self.order, self.place = _interleave([len(b) for b in blocks], np.random.default_rng(seed))
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> Any:
        """``{"input_ids": (L,) int64, "domain": name}``."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        d = int(self.order[index])
        return {"input_ids": self.blocks[d][self.place[index]], "domain": self.domains[d]}


def block_counts(proportions: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers that sum to ``total`` and differ from the exact shares by less than 1; largest remainders win.

    Raises:
        OptionError: if a proportion is negative or not finite, or all are 0.
    """
    for name, share in proportions.items():
        if not 0 <= share < math.inf:
            raise OptionError(f"proportion of {name!r} must be finite and at least 0, got {share}")
    shares = {name: Fraction(share) for name, share in proportions.items()}
    whole = sum(shares.values())
    if whole == 0:
        raise OptionError("proportions must not all be 0")
    exact = {name: share / whole * total for name, share in shares.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _interleave(counts: Sequence[int], rng: np.random.Generator) -> tuple[Any, Any]:
    """Domain and place within it of each block: domains evenly spread, with a jitter of less than their spacing."""
    times = np.concatenate([(np.arange(n) + rng.random(n)) / n for n in counts])
    domain = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(n) for n in counts])
    order = np.argsort(times, kind="stable")
    return domain[order], place[order]


def _draw(
    documents: Sequence[str], count: int, length: int, tokenize: Tokenize, rng: np.random.Generator, name: str
) -> Any:
    """``count`` blocks (count, L), pass by pass over the shuffled documents."""
    found: list[list[int]] = []
    while len(found) < count:
        before = len(found)
        for i in rng.permutation(len(documents)):
            ids = tokenize(_piece(documents[i], length, rng))[:length]
            if len(ids) == length:
                found.append(ids)
            if len(found) == count:
                break
        if len(found) == before:
            raise OptionError(f"domain {name!r} has no document of {length} tokens")
    return np.asarray(found, dtype=np.int64)


def _piece(text: str, length: int, rng: np.random.Generator) -> str:
    """Enough text for a block, from a line at random; the whole of a short document."""
    size = length * _LONGEST_TOKEN
    if len(text) <= size:
        return text
    start = int(rng.integers(len(text) - size + 1))
    line = text.rfind("\n", 0, start) + 1
    return text[line : line + size]
