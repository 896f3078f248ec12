"""How a router of ours begins where a native one was: with its rows, its biases, and the way its family selects.

D width, E experts, K slots a token.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import MixturaWarning, NotExpressibleError, OptionError, UnknownNameError
from mixtura.hf.families import selection_spec
from mixtura.hf.native import SELECTION_BIASES, NativeMixture
from mixtura.hf.seat import router_name
from mixtura.nn.routers.base import LinearGate

_OPTIONS = ("score", "order", "renormalize", "scale", "groups", "groups_kept", "group_score")


def native_options(model: Any, k: int) -> dict[str, Any]:
    """How the model's family selects, by the names of options; k alone if no spec says how.

    Args:
        model: of the native family.
        k: K, as seen.
    """
    try:
        spec = selection_spec(model.config)
    except (NotExpressibleError, UnknownNameError):
        return {"k": k}
    return {"k": k, **{name: getattr(spec, name) for name in _OPTIONS}}


@torch.no_grad()
def start_from(router: nn.Module, block: NativeMixture, layer: str) -> None:
    """Give a router what the native one has learned: the rows of its gate, their bias, and that of the selection.

    Null experts keep rows of their own. A router without parameters has nothing to begin with.

    Raises:
        OptionError: if one of the two is no linear gate, or the native one has a bias and the other has not.
    """
    if not list(router.parameters()):
        return
    gate, E = getattr(router, "gate", None), block.num_experts
    if not isinstance(gate, LinearGate) or len(gate.weight) < E:
        raise OptionError(f"start must be 'random': router {router_name(router)} has no linear gate to begin with")
    weight_ED, bias_E = linear_gate(block, layer)
    if bias_E is not None and gate.bias is None:
        raise OptionError(f"start must be 'random', or the gate have a bias (bias=True) as that of layer {layer} has")
    gate.weight[:E].copy_(weight_ED)
    if gate.bias is not None and bias_E is not None:
        gate.bias[:E].copy_(bias_E)
    _start_selection(router, block, layer)


def linear_gate(block: NativeMixture, layer: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (E, D) and bias of a native router that is a linear gate.

    Raises:
        OptionError: if it is none.
    """
    router, E = block.router, block.num_experts
    tensors = {name: p for name, p in router.named_parameters() if not _is_selection_bias(name)}  # type: ignore[union-attr]
    weights = [p for name, p in tensors.items() if name.endswith("weight") and p.ndim == 2 and len(p) >= E]
    biases = [p for name, p in tensors.items() if name.endswith("bias") and p.ndim == 1 and len(p) >= E]
    if len(weights) != 1 or len(weights) + len(biases) != len(tensors):
        raise OptionError(f"start must be 'random': {type(router).__name__} of layer {layer} is no linear gate")
    return weights[0][:E], biases[0][:E] if biases else None


def _start_selection(router: nn.Module, block: NativeMixture, layer: str) -> None:
    """Take over the bias of the old selection, or say that it is lost."""
    own = (*block.block.named_parameters(recurse=False), *block.block.named_buffers(recurse=False))
    inner = (*block.router.named_parameters(), *block.router.named_buffers())  # type: ignore[union-attr]
    old = next((tensor.reshape(-1) for name, tensor in (*inner, *own) if _is_selection_bias(name)), None)
    if old is None or not old.any():
        return
    new: torch.Tensor | None = router.selection_bias_E  # type: ignore[assignment]
    if new is not None and new.shape == old.shape:
        new.copy_(old)
        return
    warnings.warn(
        f"the selection of layer {layer} has a bias, router {router_name(router)} has none: tokens will go to other "
        "experts (aux-loss-free-bias has one)",
        MixturaWarning,
        stacklevel=5,
    )


def _is_selection_bias(name: str) -> bool:
    return name.rpartition(".")[2] in {*SELECTION_BIASES, "selection_bias"}
