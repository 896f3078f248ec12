"""Native mixtures of transformers: where they are, and how their decisions reach the tape.

A native mixture is a module with decorated experts (seam 2), and beside it a router whose first output is the logits
(seam 1). Decisions are read, and edited, at the experts seam, where they are carried out; the router adds the logits.
One whose router is one of ours (``Seat``) decides as our mixtures do, and is none of those here.

T tokens, E experts, K slots a token.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import NotExpressibleError
from mixtura.core.routing import Routing
from mixtura.hf.seat import Seat
from mixtura.hf.sites import decoder, decoder_layers, is_of_transformers
from mixtura.hf.wrong_forward import check_forward
from mixtura.nn.mixture import Mixture
from mixtura.nn.state import current_state

ROUTER_NAMES = ("gate", "router")
SELECTION_BIASES = {
    "e_score_correction_bias",
    "expert_bias",
}  # where they lie in the block, it hands them to its router
_REASON = "decisions belong to one forward call; compile without fullgraph=True"


@dataclasses.dataclass(frozen=True)
class NativeMixture:
    """One native mixture.

    Attributes:
        block: the module that holds router and experts.
        experts: decorated experts, stacked; under PEFT what the adapter wraps.
        router_name: attribute of the block; "" where the block has none of a known name.
    """

    block: nn.Module
    experts: nn.Module
    router_name: str

    @property
    def router(self) -> nn.Module | None:
        """What decides; None if it is not a module of a known name."""
        return getattr(self.block, self.router_name) if self.router_name else None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.experts.down_proj)  # type: ignore[arg-type]

    @property
    def is_seated(self) -> bool:
        """Whether one of our routers decides."""
        return self.router is not None and any(isinstance(part, Seat) for part in self.router.modules())

    def put(self, router: nn.Module, layer: str) -> None:
        """Let one of our routers decide; what decided is let go, a bias of its selection in the block too.

        Raises:
            NotExpressibleError: if the block has no router of a known name, or the router does not fit it.
            OptionError: if the router has too few columns.
        """
        if not self.router_name:
            raise NotExpressibleError(
                f"layer {layer}: {type(self.block).__name__} has no router under the names {', '.join(ROUTER_NAMES)}"
            )
        setattr(self.block, self.router_name, Seat(router, self.num_experts, layer))
        for tensors in (self.block._parameters, self.block._buffers):
            tensors.update(dict.fromkeys(tensors.keys() & SELECTION_BIASES))
        hooks = self.experts._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
            self.experts._forward_pre_hooks_with_kwargs.pop(key, None)


def native_mixtures(model: nn.Module) -> dict[str, NativeMixture]:
    """Those that decide by themselves, by the number of their decoder layer; a second one has its path behind."""
    return {layer: mixture for layer, mixture in expert_blocks(model).items() if not mixture.is_seated}


def expert_blocks(model: nn.Module) -> dict[str, NativeMixture]:
    """As ``native_mixtures``, also those whose router is one of ours; none in a model that is not of transformers.

    Raises:
        NotExpressibleError: if the transformers that is installed computes the family wrongly.
    """
    if not is_of_transformers(model):
        return {}
    check_forward(str(getattr(getattr(decoder(model), "config", None), "model_type", "")))
    ours = {id(part) for module in model.modules() if isinstance(module, Mixture) for part in module.modules()}
    found: dict[str, NativeMixture] = {}
    for number, layer in enumerate(decoder_layers(model)):
        for path, module in layer.named_modules():
            if id(module) not in ours and _is_experts(module):
                found[str(number) if str(number) not in found else f"{number}.{path}"] = _around(layer, path, module)
    return found


def _is_experts(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    return "has_gate" in vars(module) and down is not None and down.ndim == 3


def _around(layer: nn.Module, path: str, experts: nn.Module) -> NativeMixture:
    while path.endswith(".base_layer"):  # PEFT's wrappers
        path = path.removesuffix(".base_layer")
    block = layer.get_submodule(path.rpartition(".")[0])
    names = [name for name in ROUTER_NAMES if isinstance(getattr(block, name, None), nn.Module)]
    return NativeMixture(block, experts, names[0] if names else "")


def attach_natives(model: nn.Module) -> None:
    """Make the native mixtures of a model decide through the current ``RouterState``; twice is once."""
    for layer, mixture in native_mixtures(model).items():
        if any(_is_ours(hook) for hook in mixture.experts._forward_pre_hooks.values()):
            continue
        mixture.experts.register_forward_pre_hook(functools.partial(_decide, layer), with_kwargs=True)
        if mixture.router is not None:
            mixture.router.register_forward_hook(_note_logits)


def is_native_hook(hook: Any) -> bool:
    """Whether a hook is one of those that ``attach_natives`` puts on a native mixture."""
    return _is_ours(hook) or hook is _note_logits


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, functools.partial) and hook.func is _decide


@torch.compiler.disable(reason=_REASON)
def _note_logits(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Keep the router's logits for the experts that are called next."""
    state = current_state()
    if state is not None:
        first = output[0] if isinstance(output, tuple) else None
        state.logits_TE = first if isinstance(first, torch.Tensor) and first.is_floating_point() else None


@torch.compiler.disable(reason=_REASON)
def _decide(layer: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The call of the experts with the decision that the state makes of it; None leaves it as it is."""
    state = current_state()
    if state is None:
        return None
    hidden, indices, weights, *rest = (*args, *kwargs.values())  # in this order in all families
    K, E = indices.shape[-1], len(module.down_proj)  # type: ignore[arg-type]
    indices_TK, weights_TK = indices.reshape(-1, K), weights.reshape(-1, K)
    logits, state.logits_TE = state.logits_TE, None
    if logits is None or logits.numel() != len(indices_TK) * E:
        logits = torch.full((1, E), torch.nan, device=weights.device).expand(len(indices_TK), E)
    routing = Routing(logits.reshape(-1, E), weights_TK, indices_TK)
    decided = state.decide(layer, routing)
    if decided is routing:
        return None
    # backends of transformers raise or read garbage at an empty slot: the last expert with weight 0 stands in
    empty_TK = decided.indices_TK >= E
    indices_TK = decided.indices_TK.clamp(max=E - 1).to(indices.dtype)
    weights_TK = decided.weights_TK.masked_fill(empty_TK, 0).to(weights.dtype)
    shape = (*indices.shape[:-1], indices_TK.shape[-1])
    return (hidden, indices_TK.reshape(shape), weights_TK.reshape(shape), *rest), {}
