"""How each mixture of a model selects: its ``SelectionSpec`` and selection bias, ours and native alike.

With it a decision can be made again from its logits: with another k or bias, without some experts, or with experts that
are given. A mixture that decides in another way says why it cannot.

T tokens, E experts, K slots a token.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import MixturaError, NotExpressibleError
from mixtura.core.routing import Routing, dense, keep
from mixtura.core.selection import SelectionSpec, select
from mixtura.hf.families import selection_spec
from mixtura.hf.modeling import routers
from mixtura.hf.native import SELECTION_BIASES, NativeMixture, native_mixtures
from mixtura.nn.routers.base import Router
from mixtura.nn.state import RouterState


@dataclasses.dataclass(frozen=True)
class LayerSelection:
    """How one mixture selects.

    Attributes:
        layer: name on the tape.
        num_experts: E.
        spec: how logits become a routing; None if in no way that a spec says.
        refusal: why no decision can be made again from its logits; "" if it can.
        source: router of ours, or native mixture; where the selection bias is.
    """

    layer: str
    num_experts: int
    spec: SelectionSpec | None
    refusal: str
    source: nn.Module | NativeMixture

    @property
    def bias_E(self) -> torch.Tensor | None:
        """Bias that chooses and never weighs, as it is now."""
        if isinstance(self.source, NativeMixture):
            return next(_native_biases(self.source), None)
        return getattr(self.source, "selection_bias_E", None)

    def require(self, what: str) -> SelectionSpec:
        """The spec, if decisions can be made again.

        Raises:
            NotExpressibleError: if not, with the reason; it says that ``what`` needs it.
        """
        if self.refusal or self.spec is None:
            raise NotExpressibleError(f"layer {self.layer}: {what} selects again from logits, but {self.refusal}")
        return self.spec

    def again(
        self,
        routing: Routing,
        state: RouterState,
        *,
        k: int | None = None,
        bias_E: torch.Tensor | None = None,
        change: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Routing:
        """Select again from the logits of a decision.

        Args:
            routing: the decision; its logits are read.
            state: of the forward call; padding of our mixtures stays unrouted.
            k: other number of slots.
            bias_E: added to the selection bias; where logits are chosen by, to the logits.
            change: see ``select``.

        Raises:
            NotExpressibleError: if the mixture cannot, or its router gave no logits.
            OptionError: if k does not fit the spec.
        """
        spec = self.require("this")
        if k is not None:
            spec = dataclasses.replace(spec, k=k)
        logits_TE, own_E = self._known_logits(routing), self.bias_E
        if spec.order == "topk-score" and bias_E is not None:
            added_E, change = bias_E, change or (lambda choice_TE: choice_TE)
            made = select(logits_TE, spec, None, lambda choice_TE: change(choice_TE + added_E))
        else:
            total_E = bias_E if own_E is None else own_E if bias_E is None else own_E + bias_E
            made = select(logits_TE, spec, total_E, change)
        return self.without_padding(made, state)

    def weigh(self, routing: Routing, indices_TK: torch.Tensor, state: RouterState) -> Routing:
        """Routing to experts that are given, weighed by the logits of a decision; empty slots stay empty.

        Raises:
            NotExpressibleError: as ``again``.
        """
        E, K = self.num_experts, indices_TK.shape[-1]
        places_TK = torch.arange(K, 0, -1, device=indices_TK.device).expand_as(indices_TK)

        def given(choice_TE: torch.Tensor) -> torch.Tensor:
            lowest_TE = choice_TE.new_full((len(choice_TE), E + 1), float("-inf"))
            return lowest_TE.scatter(1, indices_TK, places_TK.to(choice_TE.dtype))[:, :E]

        every = dataclasses.replace(self, spec=dataclasses.replace(self.require("recomputing weights"), p=None))
        made = every.again(routing, state, k=K, change=given)
        empty_TK = indices_TK >= E
        weights_TK = dense(made).gather(1, indices_TK.clamp(max=E - 1)).masked_fill(empty_TK, 0)
        return Routing(routing.logits_TE, weights_TK, indices_TK)

    def without_padding(self, routing: Routing, state: RouterState) -> Routing:
        """Our mixtures route no padding; native ones do as their family does."""
        if isinstance(self.source, NativeMixture) or state.mask_T is None:
            return routing
        return keep(routing, state.mask_T)

    def check(self, routing: Routing) -> None:
        """Raise ``NotExpressibleError`` unless the spec explains a decision of the model itself.

        Weights are compared, slot by slot in falling order: where scores tie, experts may differ and weights do not.
        """
        native = isinstance(self.source, NativeMixture)
        if self.refusal or self.spec is None or not native or torch.compiler.is_exporting():
            return
        logits_TE = self._known_logits(routing).detach()
        expected = select(logits_TE, self.spec, self.bias_E).weights_TK.sort(-1).values
        seen = routing.weights_TK.detach().float().sort(-1).values
        if expected.shape == seen.shape:
            rounding = max(torch.finfo(routing.weights_TK.dtype).eps, 1e-5)
            close_T = ((expected - seen).abs() <= 4 * rounding * (1 + expected.abs())).all(-1)
            if not len(close_T) or close_T.float().mean() > 0.5:
                return
        raise NotExpressibleError(f"layer {self.layer}: its router decides otherwise than the spec of its family says")

    def _known_logits(self, routing: Routing) -> torch.Tensor:
        # values cannot be looked at while a model is exported
        if not torch.compiler.is_exporting() and torch.isnan(routing.logits_TE[:1]).any():
            raise NotExpressibleError(f"layer {self.layer}: its router gives no logits to select again from")
        logits_TE: torch.Tensor = routing.logits_TE
        return logits_TE


def layer_selections(model: nn.Module) -> dict[str, LayerSelection]:
    """How each mixture of a model selects, by its name on the tape, in the order of the layers; also under PEFT.

    Args:
        model: with mixtures or routers of ours, or native ones.
    """
    found = [_own(layer, router) for layer, router in routers(model).items()]
    native = native_mixtures(model)
    if native:
        spec, refusal = _native_spec(config_of(model))
        found += [_native(layer, mixture, spec, refusal) for layer, mixture in native.items()]
    found.sort(key=lambda selection: (int(selection.layer.split(".")[0]), selection.layer))
    return {selection.layer: selection for selection in found}


def config_of(model: nn.Module) -> Any:
    """Configuration of a model; also under DistributedDataParallel, which hides it."""
    while not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model.config


def _own(layer: str, router: Any) -> LayerSelection:
    spec = getattr(router, "spec", None)
    plain = isinstance(router, Router) and type(router).forward is Router.forward
    refusal = "" if plain else f"{type(router).__name__} decides in a way of its own"
    return LayerSelection(layer, int(router.num_experts), spec, refusal, router)


def _native(layer: str, mixture: NativeMixture, spec: SelectionSpec | None, refusal: str) -> LayerSelection:
    if mixture.router is None and not refusal:
        refusal = f"{type(mixture.block).__name__} has no router of a known name"
    return LayerSelection(layer, mixture.num_experts, spec, refusal, mixture)


def _native_spec(config: Any) -> tuple[SelectionSpec | None, str]:
    base = getattr(config, "base_model_type", None)
    if base is not None:  # native layers of the family mixtura
        config = copy.copy(config)
        config.model_type = base
    try:
        return selection_spec(config), ""
    except MixturaError as error:
        return None, str(error)


def _native_biases(mixture: NativeMixture) -> Iterator[torch.Tensor]:
    for named in (mixture.block.named_buffers(), mixture.block.named_parameters()):
        for name, tensor in named:
            if name.rpartition(".")[2] in SELECTION_BIASES and tensor.numel() == mixture.num_experts:
                yield tensor.detach().reshape(-1)
