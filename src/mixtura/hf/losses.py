"""Losses of a model with mixtures, read from the tape of its forward calls.

T tokens, V entries of the vocabulary, B sequences, Q positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from mixtura.core import registry
from mixtura.core.errors import OptionError, unknown_name
from mixtura.core.registry import Method
from mixtura.nn.state import RouterState

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


def balance_loss(
    states: Sequence[RouterState], terms: Mapping[str, float]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Balance terms of every mixture, layer by layer, without padding.

        loss = sum over terms  coefficient * sum over layers  mean over calls  term(routing of that call and layer)

    Exact for one forward call. Over several calls (accumulation, ranks) it is the mean of the calls' terms: z-loss, a
    mean over tokens, is exact if all calls have equally many real tokens; load balancing, a product of two means, is
    that of each call.

    Args:
        states: of the forward calls, as ``mixtura.hf.record`` gives them.
        terms: coefficient by key of a balance method.

    Returns:
        The loss, a scalar with gradient to the gates, and each term by key, detached: mean over the layers, without
        coefficient.

    Raises:
        UnknownNameError: with the nearest key, if a term is no balance method.
        OptionError: if there are terms, but no mixture was run.
    """
    methods = {key: _balance_method(key) for key in terms}
    routings = [(state, record.routing) for state in states for record in state.tape.records]
    if not terms:
        return torch.zeros(()), {}
    if not routings:
        raise OptionError(f"balance terms {sorted(terms)} need a model with mixtures, but no routing was recorded")
    layers = len(routings) / len(states)
    total = torch.zeros((), device=routings[0][1].logits_TE.device)
    parts = {}
    for key, method in methods.items():
        values = [method.build(routing, mask_T=state.mask_T) for state, routing in routings]
        value = torch.stack(values).sum() / len(states)
        total = total + terms[key] * value
        parts[key] = value.detach() / layers
    return total, parts


def _balance_method(key: str) -> Method:
    methods = {row.key: row for row in registry.methods("balance")}
    if key not in methods:
        raise unknown_name("method of balance", key, methods)
    return methods[key]
