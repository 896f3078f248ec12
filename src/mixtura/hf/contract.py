"""Which native mixtures keep the contract of the two seams, so that a router of ours can decide there; found by a run.

    logits_TE, weights_TK, indices_TK = router(hidden)       experts(hidden, indices_TK, weights_TK)

The router must give this triple, and the experts must get its indices and weights as they are. Families that do
something else are refused by name, with what they do.

T tokens, D width, E experts, K slots a token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from mixtura.core.errors import NotExpressibleError
from mixtura.hf.native import NativeMixture
from mixtura.hf.wrong_forward import check_forward

OUTSIDE: Mapping[str, str] = {
    "dbrx": "its experts are rows of one matrix, which its block takes apart itself",
    "doge": "its experts are single neurons, retrieved by product keys beside a dense layer",
    "inkling_text": "its router also weighs the shared experts",
    "jetmoe": "its router sorts tokens by expert itself, and its attention has experts too",
    "llama4_text": "its router weighs the inputs of experts, all of which run on every token",
    "longcat_flash": "its block carries out its identity experts itself",
    "nllb-moe": "it is an encoder and a decoder, and its experts have a capacity",
    "step3p5": "its router and experts are one module",
    "switch_transformers": "it is an encoder and a decoder, and its experts have a capacity",
    "zaya": "its router hands a state to the next layer's, and its last class skips the layer",
}


class Seen(NamedTuple):
    """What was seen of one native mixture in a run.

    Attributes:
        dim: D, width of what its router reads.
        k: K.
    """

    dim: int
    k: int


def check_family(model: Any) -> None:
    """Raise ``NotExpressibleError`` if the model's family is known to be outside of the contract, with the reason."""
    model_type = family_name(model)
    check_forward(model_type)
    if model_type in OUTSIDE:
        raise NotExpressibleError(f"{model_type}: {OUTSIDE[model_type]}, so no router of ours can decide there")


def family_name(model: Any) -> str:
    """Model type of the text part, of the base for a model of ours."""
    config = model.config.get_text_config()
    return str(getattr(config, "base_model_type", config.model_type))


@contextlib.contextmanager
def watch(model: Any, blocks: Mapping[str, NativeMixture]) -> Iterator[dict[str, Seen]]:
    """What the blocks do in one forward call inside of the ``with``, by layer; checked when it ends.

    Raises:
        NotExpressibleError: if a block does not keep the contract, or was not called.
    """
    calls: dict[tuple[str, str], tuple[tuple[Any, ...], Any]] = {}
    seen: dict[str, Seen] = {}
    with contextlib.ExitStack() as stack:
        for layer, block in blocks.items():
            for part, module in (("router", _router(model, layer, block)), ("experts", block.experts)):
                note = functools.partial(_note, calls, (layer, part))
                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        yield seen
    for layer, block in blocks.items():
        if (layer, "router") not in calls or (layer, "experts") not in calls:
            raise NotExpressibleError(f"{family_name(model)}: layer {layer}: its mixture was not called")
        (hidden, *_), out = calls[layer, "router"]
        if reason := _breaks(out, calls[layer, "experts"][0], block.num_experts):
            raise NotExpressibleError(f"{family_name(model)}: layer {layer}: {reason}")
        seen[layer] = Seen(hidden.shape[-1], out[2].shape[-1])


def _note(calls: dict[Any, Any], key: Any, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    calls[key] = ((*args, *kwargs.values()), output)


def _router(model: Any, layer: str, block: NativeMixture) -> nn.Module:
    if block.router is None:
        raise NotExpressibleError(
            f"{family_name(model)}: layer {layer}: {type(block.block).__name__} has no router of a known name"
        )
    return block.router


def _breaks(out: Any, given: tuple[Any, ...], num_experts: int) -> str:
    """How a block breaks the contract, "" if it does not.

    Args:
        out: of the router.
        given: to the experts: hidden states, indices, weights.
        num_experts: E.
    """
    if not isinstance(out, tuple) or len(out) != 3:
        return f"its router gives {len(out) if isinstance(out, tuple) else type(out).__name__}, not three results"
    logits, weights, indices = out
    if not logits.is_floating_point() or logits.shape[-1] < num_experts or indices.is_floating_point():
        return "its router does not give logits, weights and indices"
    if not _same(indices, given[1]) or not _same(weights, given[2]):
        return "its experts do not get what its router gives"
    return ""


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.numel() == theirs.numel() and torch.equal(ours.reshape(-1).to(theirs.dtype), theirs.reshape(-1))
