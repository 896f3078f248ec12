"""Load-balancing loss: the busier an expert, the less probable it should be.

    loss = E * sum_e f_e * P_e,   f_e = share of the filled slots that e got,   P_e = mean probability of e

1 at perfect balance for every k; E when one expert gets all. The gradient goes to the logits through P, f is a
constant.

Paper versus code: Switch has k = 1; GShard's and Mixtral's top-2 in transformers leave f at k and pool all layers
before the product, so that a layer that collapsed on one half of the experts hides one that collapsed on the other.
Here f is divided by the filled slots and every layer has its own loss. Which tokens f is taken from is the choice of a
statistic (``micro-batch-load``, ``global-batch-lbl``, ``previous-step-load``).

Reference: Fedus et al., arXiv:2101.03961, eq. 4-6.
"""

from __future__ import annotations

import torch

from mixtura.core.arrays import float32
from mixtura.core.errors import OptionError, ShapeError
from mixtura.core.registry import method
from mixtura.core.routing import Routing, load, only


@method("load-balancing", role="balance", paper="arXiv:2101.03961")
def load_balancing_loss(
    routing: Routing,
    *,
    mask_T: torch.Tensor | None = None,
    load_E: torch.Tensor | None = None,
    score: str = "softmax",
) -> torch.Tensor:
    """Switch load-balancing loss, E * sum_e f_e * P_e; 1 at perfect balance for every k.

    Args:
        routing: of one layer; logits (T, E), computed in float32.
        mask_T: True where a token counts; padding must be False.
        load_E: f, from a statistic over more tokens; None is that of this routing.
        score: "softmax" or "sigmoid": what turns logits into P; sigmoid scores are divided by their sum over the
            experts.

    Returns:
        A scalar; 0 if no token counts.

    Raises:
        OptionError: for another score.
        ShapeError: if mask_T has another length than the routing or is not boolean, or load_E has not E entries.

    Source:
        Fedus et al., arXiv:2101.03961, eq. 4-6.
    """
    routing = only(routing, mask_T)
    f_E = load(routing) if load_E is None else load_E
    if tuple(f_E.shape) != (routing.num_experts,):
        raise ShapeError(f"load_E must have shape ({routing.num_experts},), got {tuple(f_E.shape)}")
    probability_TE = _probability(routing.logits_TE, score)
    P_E = probability_TE.sum(0) / max(len(probability_TE), 1)
    loss: torch.Tensor = routing.num_experts * (f_E.to(P_E.dtype) * P_E).sum()
    return loss


def _probability(logits_TE: torch.Tensor, score: str) -> torch.Tensor:
    wide_TE: torch.Tensor = float32(logits_TE)
    if score == "softmax":
        return wide_TE.softmax(-1)
    if score == "sigmoid":
        # softmax of log-sigmoid = sigmoid over its sum, also where every score underflows
        return torch.nn.functional.logsigmoid(wide_TE).softmax(-1)
    raise OptionError(f"score must be 'softmax' or 'sigmoid', got {score!r}")
