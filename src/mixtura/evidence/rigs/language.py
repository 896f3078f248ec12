"""R-LM-S: a byte-level causal language model whose feed-forward layers are what an arm says.

D 64, 2 layers, 4 heads, sequences of 64 bytes from four domains, 16 a step. A layer is {"dense": width},
{"mixture": {"router": ..., "experts": [...], "shared": ...}} as ``Mixture.from_config`` takes it without the width of
the model, or {"layer": key, ...} for a registered arrangement. Everything else is equal in all arms.

T tokens: B sequences of Q positions. D width, E experts, K slots a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixtura.core import registry
from mixtura.core.routing import Routing
from mixtura.evidence.rigs.random_router import RandomRouter
from mixtura.evidence.rigs.text import VOCABULARY
from mixtura.nn import ExpertGroup, FeedForward, Mixture
from mixtura.nn.state import RouterState, use_state

DIM, LAYERS, HEADS, LENGTH = 64, 2, 4, 64


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before and a residual connection."""

    def __init__(self, feed_forward: nn.Module, dim: int = DIM, heads: int = HEADS, *, causal: bool = True) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.feed_forward, self.heads, self.causal = feed_forward, heads, causal

    def forward(self, hidden_BQD: torch.Tensor) -> torch.Tensor:
        """Next hidden states."""
        B, Q, D = hidden_BQD.shape
        qkv = self.qkv(self.norms[0](hidden_BQD)).view(B, Q, 3, self.heads, D // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        hidden_BQD = hidden_BQD + self.out(mixed.transpose(1, 2).reshape(B, Q, D))
        result: torch.Tensor = hidden_BQD + self.feed_forward(self.norms[1](hidden_BQD))
        return result


class LanguageModel(nn.Module):
    """Bytes to logits of the next byte.

    Args:
        layer: what stands in place of the feed-forward layers; see the file's docstring.
        bigrams: whether routers are given pairs of bytes as token ids, for tables by token.
    """

    def __init__(self, layer: Mapping[str, Any], *, bigrams: bool = False) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(VOCABULARY, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.ModuleList(Block(feed_forward(layer, str(n))) for n in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, VOCABULARY, bias=False)
        self.bigrams = bigrams
        start(self)

    def forward(self, bytes_BQ: torch.Tensor) -> tuple[torch.Tensor, RouterState]:
        """Logits (B, Q, 256), and what the routers decided."""
        state = RouterState(token_T=self._ids(bytes_BQ).flatten(), rows=len(bytes_BQ))
        hidden_BQD = self.bytes(bytes_BQ) + self.places.weight[: bytes_BQ.shape[1]]
        with use_state(state):
            for block in self.blocks:
                hidden_BQD = block(hidden_BQD)
        return self.head(self.norm(hidden_BQD)), state

    def _ids(self, bytes_BQ: torch.Tensor) -> torch.Tensor:
        before_BQ = F.pad(bytes_BQ, (1, 0))[:, :-1]
        return before_BQ * VOCABULARY + bytes_BQ if self.bigrams else bytes_BQ


def feed_forward(layer: Mapping[str, Any], name: str, dim: int = DIM) -> nn.Module:
    """A feed-forward layer by its description."""
    if "dense" in layer:
        return FeedForward(dim, layer["dense"])
    if "layer" in layer:
        options = {option: value for option, value in layer.items() if option != "layer"}
        mixture = registry.get(layer["layer"])(dim, **options)
    else:
        mixture = _mixture(layer["mixture"], dim)
    mixture.layer = name
    return mixture  # type: ignore[no-any-return]


def _mixture(config: Mapping[str, Any], dim: int) -> Mixture:
    if config["router"]["method"] == "random":
        router: nn.Module = RandomRouter(config["router"]["num_experts"], config["router"]["k"])
    else:
        router = registry.build({**config["router"], "dim": dim})
    forms = [registry.build({**form, "dim": dim}) for form in config["experts"]]
    shared = FeedForward(dim, config["shared"]) if config.get("shared") else None
    return Mixture(router, forms[0] if len(forms) == 1 else ExpertGroup(forms), shared)


def start(model: nn.Module) -> None:
    """Draw all weights from N(0, 0.02^2), those that end a residual branch smaller; norms stay."""
    ends = ("out.weight", "down_proj", "down_proj.weight")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if name.endswith(ends) else 0.02)


def decided(state: RouterState) -> list[Routing]:
    """Decisions of one call, by layer."""
    return [record.routing for record in state.tape.records]
