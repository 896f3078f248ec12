"""Families that a transformers computes wrongly: they are refused before anything is read off them.

T tokens, D width, E experts.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from mixtura.core.errors import NotExpressibleError


def check_forward(model_type: str) -> None:
    """Raise ``NotExpressibleError`` if the transformers that is installed computes a family wrongly.

    Found by a small run and not by the version, so that a repaired one is accepted.

    Args:
        model_type: of a configuration.
    """
    if model_type == "nllb-moe" and not nllb_is_right():
        raise NotExpressibleError(
            "nllb-moe: this version of transformers computes its mixtures wrongly (experts get a mask where they "
            "expect indices, so that only the first two ever work); use a version that repairs it"
        )


@functools.cache
def nllb_is_right() -> bool:
    """Whether an NLLB mixture of this transformers adds up its two best experts, each with its share."""
    from transformers.models.nllb_moe import modeling_nllb_moe as nllb

    options = {"d_model": 8, "num_experts": 4, "expert_capacity": 64, "moe_token_dropout": 0.0, "router_bias": False}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        block = nllb.NllbMoeSparseMLP(nllb.NllbMoeConfig(**options), 8).eval()
        hidden_TD = torch.randn(16, 8)
        out = block(hidden_TD[None])
    out_TD = (out[0] if isinstance(out, tuple) else out).reshape(16, 8)
    return torch.allclose(out_TD, _nllb_formula(block, hidden_TD), atol=1e-5)


@torch.no_grad()
def _nllb_formula(block: nn.Module, hidden_TD: torch.Tensor) -> torch.Tensor:
    probabilities_TE = F.linear(hidden_TD, block.router.classifier.weight).softmax(-1)  # type: ignore[union-attr, arg-type]
    weights_T2, indices_T2 = probabilities_TE.topk(2)
    weights_T2 = weights_T2 / weights_T2.sum(-1, keepdim=True)
    every_TED = torch.stack([expert(hidden_TD) for expert in block.experts.children() if hasattr(expert, "fc1")], 1)  # type: ignore[union-attr, operator]
    chosen_T2D = every_TED.gather(1, indices_T2[..., None].expand(-1, -1, hidden_TD.shape[1]))
    return (weights_T2[..., None] * chosen_T2D).sum(1)
