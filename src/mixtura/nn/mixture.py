"""``Mixture``: the layer y = sum_k g_k(x) f_k(x), with an expert that is always on if wanted.

T tokens, D width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mixtura.core import registry
from mixtura.core.errors import OptionError
from mixtura.core.routing import Routing
from mixtura.nn.experts.activations import activation as activation_named
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.state import current_state


@torch.compiler.disable(reason="a router's state belongs to one forward call; compile without fullgraph=True")  # type: ignore[untyped-decorator, no-untyped-call]
def decide(router: nn.Module, hidden_TD: torch.Tensor, layer: str) -> Routing:
    """What a layer's router decides in the current ``RouterState``, after edits and on the tape; without one, alone."""
    state = current_state()
    if state is None:
        return router(hidden_TD)  # type: ignore[no-any-return]
    state.layer = layer
    return state.decide(layer, router(hidden_TD))


class FeedForward(nn.Module):
    """One dense feed-forward layer; the shared expert of a mixture.

    Args:
        dim: D.
        width: F.
        activation: name, see ``mixtura.nn.experts.activations``.
        gated: whether a gate multiplies the up projection.
        bias: whether all projections have biases.
    """

    def __init__(
        self, dim: int, width: int, *, activation: str = "silu", gated: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        self.config = {"dim": dim, "width": width, "activation": activation, "gated": gated, "bias": bias}
        self.gate_proj = nn.Linear(dim, width, bias=bias) if gated else None
        self.up_proj = nn.Linear(dim, width, bias=bias)
        self.down_proj = nn.Linear(width, dim, bias=bias)
        self.act_fn = activation_named(activation)

    def forward(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """down(act(gate x) * up x), or down(act(up x))."""
        up_TF = self.up_proj(hidden_TD)
        inner_TF = self.act_fn(up_TF) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_TD)) * up_TF
        return self.down_proj(inner_TF)  # type: ignore[no-any-return]


class Mixture(nn.Module):
    """Router, experts, and a shared expert if there is one.

    Args:
        router: hidden_TD -> Routing.
        experts: seam 2, ``Experts`` or ``ExpertGroup``.
        shared: expert that every token passes with weight 1.
        layer: name on the tape.

    Raises:
        OptionError: if router and experts disagree on E.
    """

    def __init__(
        self, router: nn.Module, experts: nn.Module, shared: FeedForward | None = None, *, layer: str = "0"
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise OptionError(
                f"the router chooses among {router.num_experts} experts, but there are {experts.num_experts}"
            )
        self.router, self.experts, self.shared = router, experts, shared
        self.layer = layer

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mix; any leading shape, last axis D. The decision goes on the tape of the current ``RouterState``."""
        hidden_TD = hidden.reshape(-1, hidden.shape[-1])
        routing = decide(self.router, hidden_TD, self.layer)
        out_TD = self._weigh(hidden_TD, routing)
        if self.shared is not None:
            out_TD = out_TD + self.shared(hidden_TD)
        return out_TD.view_as(hidden)

    def _weigh(self, hidden_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        weights_TK = routing.weights_TK.to(hidden_TD.dtype)
        if self.router.weight_on == "output":
            return self.experts(hidden_TD, routing.indices_TK, weights_TK)  # type: ignore[no-any-return]
        (T, K), D = weights_TK.shape, hidden_TD.shape[-1]
        weighted_SD = (weights_TK[..., None] * hidden_TD[:, None]).reshape(T * K, D)
        indices_S1 = routing.indices_TK.reshape(-1, 1)
        filled_S1 = (indices_S1 < routing.num_experts).to(hidden_TD.dtype)
        return self.experts(weighted_SD, indices_S1, filled_S1).view(T, K, D).sum(1)  # type: ignore[no-any-return]

    @property
    def config(self) -> dict[str, Any]:
        """What ``from_config`` builds an equal (not yet trained) mixture from; plain JSON.

        Raises:
            OptionError: if the router or a form of experts is no registered method.
        """
        forms = self.experts.forms if isinstance(self.experts, ExpertGroup) else [self.experts]
        return {
            "router": method_config(self.router),
            "experts": [method_config(form) for form in forms],
            "shared": None if self.shared is None else self.shared.config,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, layer: str = "0") -> Mixture:
        """Build from ``config``.

        Raises:
            OptionError: if an entry is missing, unknown or does not fit.
            UnknownNameError: for an unknown method.
        """
        unknown = sorted(set(config) - {"router", "experts", "shared"})
        if unknown or not {"router", "experts"} <= set(config):
            raise OptionError(f"a mixture has the entries router, experts, shared; got {sorted(config)}")
        forms = [registry.build(form) for form in config["experts"]]
        experts = forms[0] if len(forms) == 1 else ExpertGroup(forms)
        return cls(registry.build(config["router"]), experts, _shared(config.get("shared")), layer=layer)


def method_config(module: nn.Module) -> dict[str, Any]:
    """What ``registry.build`` builds an equal module from.

    Raises:
        OptionError: if the module is no registered method.
    """
    config: dict[str, Any] | None = getattr(module, "method_config", None)
    if config is None:
        raise OptionError(f"{type(module).__name__} has no configuration: register the class with @method")
    return config


def _shared(options: Mapping[str, Any] | None) -> FeedForward | None:
    try:
        return None if options is None else FeedForward(**options)
    except TypeError as error:
        raise OptionError(f"shared: {error}") from None
