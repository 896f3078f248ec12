"""``Seat``: where a native mixture has its router, it has one of ours, and gives the block the triple that it expects.

T tokens, D width, E experts of the block, K slots a token. A router may have more columns than the block has experts:
the experts of those answer 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import NotExpressibleError, OptionError
from mixtura.core.selection import SelectionSpec
from mixtura.nn.mixture import decide


class Seat(nn.Module):
    """Stands in the place of a native router; the tensors of ours are ``<place>.router``.

    What is decided is on the tape as the router says it. The block gets empty slots, and those of experts that it has
    not, as its last expert with weight 0, since backends of transformers raise or read garbage at any other index.

    Args:
        router: hidden_TD -> Routing.
        num_experts: E.
        layer: name on the tape.

    Raises:
        NotExpressibleError: if the router weighs the inputs of experts, or has columns that no expert of the block
            answers and that do not stand for 0.
        OptionError: if it has fewer columns than the block has experts.
    """

    def __init__(self, router: nn.Module, num_experts: int, layer: str) -> None:
        super().__init__()
        check_router(router, num_experts)
        self.router, self.num_experts, self.layer = router, num_experts, layer

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (T, columns), weights and indices (T, K); what a block gives its own router besides is not read."""
        routing = decide(self.router, hidden.reshape(-1, hidden.shape[-1]), self.layer)
        absent_TK = routing.indices_TK >= self.num_experts
        weights_TK = routing.weights_TK.masked_fill(absent_TK, 0).to(hidden.dtype)
        return routing.logits_TE, weights_TK, routing.indices_TK.clamp(max=self.num_experts - 1)


def check_router(router: nn.Module, num_experts: int) -> None:
    """Raise as ``Seat`` does unless the router fits a block of that many experts."""
    spec: SelectionSpec | None = router.spec  # type: ignore[assignment]
    columns, nulls = int(router.num_experts), spec.null_experts if spec else 0  # type: ignore[arg-type]
    name = router_name(router)
    if router.weight_on != "output":
        raise NotExpressibleError(
            f"router {name} weighs the inputs of experts; blocks of transformers weigh outputs: use weight_on='output'"
        )
    if columns - nulls < num_experts:
        true = f"{columns} experts" + (f", {nulls} of them null" if nulls else "")
        raise OptionError(f"router {name} chooses among {true}, but the block has {num_experts}")
    if columns - nulls > num_experts:
        raise NotExpressibleError(
            f"router {name} chooses among {columns} experts, {nulls} of which answer 0, but the block has "
            f"{num_experts}: give it as many, or convert the layer to a Mixture whose experts have the other forms"
        )


def router_name(router: nn.Module) -> str:
    """Key of its method, or its class."""
    config: Mapping[str, Any] = getattr(router, "method_config", {})
    return str(config.get("method", type(router).__name__))


def seats(model: nn.Module) -> dict[str, Seat]:
    """The seats of a model by the number of their decoder layer; also under PEFT."""
    return {module.layer: module for module in model.modules() if isinstance(module, Seat)}
