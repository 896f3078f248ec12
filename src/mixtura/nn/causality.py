"""``sees_future``: whether a router lets the routing of a token depend on tokens after it, found by trying.

A decoder that is trained with such a router meets another one in generation, where there are no later tokens.

B sequences of Q positions, T = B Q tokens row by row, D width, E experts.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import nn

from mixtura.core import registry
from mixtura.core.errors import MixturaWarning, OptionError
from mixtura.core.routing import Routing
from mixtura.core.selection import SelectionSpec, select
from mixtura.nn.state import RouterState, use_state

B, Q = 3, 8


class _Call(NamedTuple):
    """What a router can see, position by position."""

    hidden_BQD: torch.Tensor
    token_BQ: torch.Tensor
    before_BQE: torch.Tensor
    real_BQ: torch.Tensor

    def with_suffix(self, other: _Call, cut: int) -> _Call:
        """The call whose positions from ``cut`` on are those of another."""
        return _Call(*(torch.cat([x[:, :cut], y[:, cut:]], 1) for x, y in zip(self, other, strict=True)))


def sees_future(router: nn.Module, *, dim: int | None = None, seed: int = 0) -> bool:
    """Whether the routing of some tokens changes when only later tokens do.

    The router, in eval mode, routes a few sequences of random hidden states, token ids (0 and 1) and logits of a
    mixture before it. At every cut the positions after it are replaced by others, or become padding; indices and
    weights before it must stay equal to the bit. A change that only certain values would provoke can escape.

    Args:
        router: hidden_TD -> Routing; its mode is restored. Of one on the meta device an equal one with values is
            tried.
        dim: D; None takes it from the router's configuration.
        seed: of what is drawn.

    Raises:
        OptionError: if dim is not given and the router has no configuration.
    """
    dim = _dim(router) if dim is None else dim
    router = _with_values(router)
    training = router.training
    router.eval()
    try:
        # the same random numbers in every call, for a router that draws some
        with torch.no_grad(), torch.random.fork_rng():
            return _any_change(router, dim, seed)
    finally:
        router.train(training)


def _with_values(router: nn.Module) -> nn.Module:
    """The router, or one of the same configuration on the CPU if it has no values."""
    if not any(tensor.is_meta for tensor in (*router.parameters(), *router.buffers())):
        return router
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore", MixturaWarning)  # of choices that were warned of when the router was made
        return registry.build(router.method_config)  # type: ignore[no-any-return, arg-type]


def _any_change(router: nn.Module, dim: int, seed: int) -> bool:
    generator = torch.Generator().manual_seed(seed)
    first, second = (_draw(router, dim, generator) for _ in range(2))
    gone = first._replace(real_BQ=torch.zeros_like(first.real_BQ))
    whole = _route(router, first, seed)
    for cut in range(1, Q):
        for other in (second, gone):
            changed = _route(router, first.with_suffix(other, cut), seed)
            if not all(torch.equal(a[:, :cut], b[:, :cut]) for a, b in zip(whole, changed, strict=True)):
                return True
    return False


def _draw(router: nn.Module, dim: int, generator: torch.Generator) -> _Call:
    E = int(router.num_experts)  # type: ignore[arg-type]
    return _Call(
        torch.randn(B, Q, dim, generator=generator),
        torch.randint(2, (B, Q), generator=generator),
        torch.randn(B, Q, E, generator=generator),
        torch.ones(B, Q, dtype=torch.bool),
    )


def _route(router: nn.Module, call: _Call, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights (B, Q, K)."""
    torch.manual_seed(seed)
    device = next((tensor.device for tensor in (*router.parameters(), *router.buffers())), torch.device("cpu"))
    hidden_TD, token_T, before_TE, real_T = (part.flatten(0, 1).to(device) for part in call)
    state = RouterState(mask_T=real_T, token_T=token_T, rows=B)
    state.tape.write("before", select(before_TE, SelectionSpec(k=1)))
    with use_state(state):
        routing: Routing = router(hidden_TD)
    return routing.indices_TK.view(B, Q, -1), routing.weights_TK.view(B, Q, -1)


def _dim(router: nn.Module) -> int:
    config = getattr(router, "method_config", {})
    if "dim" not in config:
        raise OptionError(f"{type(router).__name__} has no configuration that names its dim: give dim")
    return int(config["dim"])
