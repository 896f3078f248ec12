"""Bytes of four kinds of real text, for small language models.

A sequence is Q bytes of one domain. Seeds decide which sequences are drawn and in what order, so that arms of one seed
see the same ones.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from mixtura.data import Corpus

DOMAINS = ("code-python", "code-cpp", "man-de", "shakespeare")
LOCAL = DOMAINS[:2]  # need no download
BYTES = 2_000_000  # of each domain, to learn from
VOCABULARY = 256


class Text(NamedTuple):
    """Bytes by domain.

    Attributes:
        train: (bytes,), uint8, of each domain.
        held_out: the same, of documents that are not in ``train``.
    """

    train: list[torch.Tensor]
    held_out: list[torch.Tensor]


@functools.cache
def read(domains: tuple[str, ...] = DOMAINS) -> Text:
    """Text of the domains, documents one after the other with a zero byte between.

    Raises:
        FetchError: if a domain cannot be had.
    """
    corpus = Corpus.load(domains, on_missing="raise")
    return Text(*([_joined(side[name]) for name in domains] for side in (corpus.train, corpus.held_out)))


def _joined(documents: list[str]) -> torch.Tensor:
    whole = b"\0".join(document.encode() for document in documents)[:BYTES]
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


def draw(sides: list[torch.Tensor], rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """``rows`` sequences of ``length + 1`` bytes, domains in turn: (rows, length + 1), int64."""
    texts = [sides[row % len(sides)] for row in range(rows)]
    starts = [int(torch.randint(len(text) - length, (), generator=generator)) for text in texts]
    return torch.stack([text[s : s + length + 1] for text, s in zip(texts, starts, strict=True)]).long()


def held_out_sequences(text: Text, rows: int, length: int) -> torch.Tensor:
    """The same sequences for every arm and seed, spread evenly: (rows, length + 1), int64, domains in turn."""
    taken = []
    for row in range(rows):
        side = text.held_out[row % len(text.held_out)]
        place = (row // len(text.held_out)) * len(text.held_out) / rows
        start = int(place * (len(side) - length - 1))
        taken.append(side[start : start + length + 1])
    return torch.stack(taken).long()
