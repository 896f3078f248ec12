"""The loss of a causal language model.

T tokens, V entries of the vocabulary, B sequences, Q positions.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

IGNORED = -100  # label of a position that is not predicted, as in transformers


def next_token_loss(
    logits_BQV: torch.Tensor, labels_BQ: torch.Tensor, count: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of each next token, in float32, in nats.

    Args:
        logits_BQV: of a causal language model.
        labels_BQ: the tokens themselves; ``IGNORED`` where nothing is to be predicted.
        count: what the sum is divided by: the predicted tokens of all micro-batches of a step, so that accumulation
            gives the mean over the step; None is those of this call.

    Returns:
        A scalar; 0 if nothing is predicted.
    """
    # the labels move, not the logits: a shifted view of the logits could not be flattened without a copy of all of them
    labels_BQ = F.pad(labels_BQ[:, 1:], (0, 1), value=IGNORED)
    labels_T = labels_BQ.reshape(-1)
    logits_TV = logits_BQV.reshape(len(labels_T), -1)
    total = F.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED, reduction="sum")
    count = labels_T.ne(IGNORED).sum() if count is None else count
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)
