"""Bits per byte on held-out text, by domain: comparable between models, and between tokenizers.

    bits per byte = sum over predicted tokens of -log2 p(token)  /  bytes of the text of these tokens

Text is cut into windows within documents; the first token of a window has no context and is neither predicted nor
counted. L tokens of a window, B windows of a batch, V entries of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from mixtura.core.errors import OptionError
from mixtura.hf.losses import IGNORED, next_token_loss


@dataclasses.dataclass(frozen=True)
class Window:
    """A piece of a document.

    Attributes:
        ids: its tokens, at most L.
        bytes: of each of them, in UTF-8.
    """

    ids: list[int]
    bytes: list[int]


@torch.no_grad()
def bits_per_byte(
    model: Any,
    tokenizer: Any,
    held_out: Mapping[str, Sequence[str]],
    *,
    length: int = 256,
    max_tokens: int = 8192,
    batch_size: int = 4,
    progress: bool = True,
) -> dict[str, float]:
    """Bits per byte of each domain; equal for equal arguments, and of the same tokens for every model of a tokenizer.

    Args:
        model: causal language model; it is left in the mode it was in.
        tokenizer: a fast tokenizer.
        held_out: documents by domain.
        length: L, tokens of a window.
        max_tokens: predicted tokens of a domain, at most; windows come from all documents in turn.
        batch_size: windows of a forward pass; does not change the result beyond rounding.
        progress: whether a bar is shown on standard error.

    Returns:
        Bits per byte by domain, and their unweighted mean as "mean".

    Raises:
        OptionError: if a domain has no text to predict, there is none, or one is called "mean".
    """
    if not held_out or "mean" in held_out:
        raise OptionError(f"held_out must name at least one domain, none of them 'mean', got {sorted(held_out)}")
    chosen = {name: windows(tokenizer, texts, length, max_tokens) for name, texts in held_out.items()}
    for name, found in chosen.items():
        if not found:
            raise OptionError(f"domain {name!r} has no held-out text of at least two tokens")
    was_training = model.training
    model.eval()
    result = {}
    with tqdm(total=sum(map(len, chosen.values())), desc="evaluate", unit="window", disable=not progress) as bar:
        for name, found in chosen.items():
            nats = 0.0
            for batch in _batches(found, batch_size):
                nats += _nats(model, batch)
                bar.update(len(batch))
            result[name] = nats / math.log(2) / sum(sum(window.bytes[1:]) for window in found)
    model.train(was_training)
    return {**result, "mean": sum(result.values()) / len(result)}


def windows(tokenizer: Any, texts: Sequence[str], length: int, max_tokens: int) -> list[Window]:
    """Windows of at most ``length`` tokens: those at the heads of all documents, then the second of each, and so on.

    A document of fewer tokens is one window; what is left over at the end of a longer one is not used.

    Raises:
        OptionError: if length is below 2 or max_tokens below 1.
    """
    if length < 2 or max_tokens < 1:
        raise OptionError(f"length must be at least 2 and max_tokens at least 1, got {length} and {max_tokens}")
    found: list[Window] = []
    left = max_tokens
    for window in _all_windows(tokenizer, texts, length):
        found.append(Window(window.ids[: left + 1], window.bytes[: left + 1]))
        left -= len(found[-1].ids) - 1
        if left == 0:
            break
    return found


def _all_windows(tokenizer: Any, texts: Sequence[str], length: int) -> Iterator[Window]:
    """Every window, in their order; documents are tokenized as they are reached."""
    documents: list[Window] = []
    for text in texts:
        documents.append(_tokenize(tokenizer, text))
        if len(documents[-1].ids) >= 2:
            yield Window(documents[-1].ids[:length], documents[-1].bytes[:length])
    for start in range(length, max((len(document.ids) for document in documents), default=0), length):
        for document in documents:
            if start + length <= len(document.ids):
                yield Window(document.ids[start : start + length], document.bytes[start : start + length])


def _tokenize(tokenizer: Any, text: str) -> Window:
    """A document's tokens and the bytes of each; the bytes sum to those of the text, up to what a tokenizer drops.

    A token of a byte-level vocabulary has one character for every byte, which is exact even where a token ends within a
    character. Where the sum shows that the vocabulary is another, a token has the bytes from the end of the one before
    to its own end in the text.
    """
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"]
    sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    if sum(sizes) == len(text.encode()):
        return Window(ids, sizes)
    sizes, end = [], 0
    for _, stop in encoded["offset_mapping"]:
        sizes.append(len(text[end:stop].encode()))
        end = max(end, stop)
    return Window(ids, sizes)


def _batches(found: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    return (found[i : i + size] for i in range(0, len(found), size))


def _nats(model: Any, batch: Sequence[Window]) -> float:
    """Sum of -ln p over the predicted tokens; shorter windows are padded on the right and masked."""
    width = max(len(window.ids) for window in batch)
    ids_BL = torch.tensor([window.ids + [IGNORED] * (width - len(window.ids)) for window in batch], device=model.device)
    padding_BL = ids_BL == IGNORED
    mask_BL = (~padding_BL).long() if padding_BL.any() else None
    outputs = model(input_ids=ids_BL.masked_fill(padding_BL, 0), attention_mask=mask_BL, use_cache=False)
    return float(next_token_loss(outputs.logits, ids_BL, count=1))
