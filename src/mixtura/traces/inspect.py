"""Run documents through a mixture and keep every decision.

L tokens of a window, B windows of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mixtura.core.errors import OptionError
from mixtura.traces.capture import capture
from mixtura.traces.trace import Trace


@torch.no_grad()
def capture_documents(
    model: Any,
    tokenizer: Any,
    documents: Mapping[str, Sequence[str]],
    *,
    length: int = 256,
    max_tokens: int = 2048,
    batch_size: int = 4,
) -> Trace:
    """Trace of the heads of documents, by domain.

    Args:
        model: with mixtures, native or of the family.
        tokenizer: of it.
        documents: by domain.
        length: L, tokens of a document that are run.
        max_tokens: of a domain, at most.
        batch_size: B.

    Raises:
        OptionError: if a domain has no token.
        NotExpressibleError: if the model has no mixture that could be seen.
    """
    if tokenizer is None:
        raise OptionError("text needs a tokenizer, but the model has none")
    model.eval()
    traces = []
    for name, texts in documents.items():
        rows = _heads(tokenizer, texts, length, max_tokens)
        if not rows:
            raise OptionError(f"domain {name!r} has no token")
        for start in range(0, len(rows), batch_size):
            ids_BL, mask_BL = _padded(rows[start : start + batch_size])
            with capture(model, domain=name) as trace:
                model(ids_BL.to(model.device), attention_mask=mask_BL.to(model.device), use_cache=False)
            traces.append(trace)
    return Trace.concat(traces)


def _heads(tokenizer: Any, texts: Sequence[str], length: int, max_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    left = max_tokens
    for text in texts:
        if left <= 0:
            break
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: min(length, left)]
        if ids:
            rows.append(ids)
            left -= len(ids)
    return rows


def _padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids_BL = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask_BL = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids_BL, mask_BL
