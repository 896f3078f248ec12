"""One ``RouterState`` for every forward call of a model: opened by a hook on the decoder, and listened to on demand.

B sequences, Q positions of this call, T = B Q tokens, row by row.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import OptionError
from mixtura.hf.native import attach_natives, is_native_hook
from mixtura.hf.sites import decoder
from mixtura.nn.state import RouterState, checkpoint_context, current_state, set_state

_LISTENERS: weakref.WeakKeyDictionary[nn.Module, list[Listener]] = weakref.WeakKeyDictionary()


class Listener:
    """What is told of every forward call; both methods do nothing unless overridden."""

    def opened(self, state: RouterState, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call of the decoder with these arguments begins; ``state.edits`` may be added to."""

    def closed(self, state: RouterState) -> None:
        """The call has ended, or failed; ``state.tape`` has its decisions."""


def attach_state(model: nn.Module) -> None:
    """Make every forward call of the decoder of ``model`` open a state of its own; twice is once.

    Decisions of native mixtures go on its tape too, and recomputation sees the state of its own forward.

    Raises:
        OptionError: if the model checkpoints activations reentrantly.
    """
    inner = decoder(model)
    attach_natives(model)
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = with_state(function)  # type: ignore[assignment]
    if _open_state in inner._forward_pre_hooks.values():
        return
    inner.register_forward_pre_hook(_open_state, with_kwargs=True)
    inner.register_forward_hook(_close_state, always_call=True)
    if "torch._dynamo" in sys.modules:
        # what was compiled before, for this model or another one of its class, would go on without the hooks
        torch.compiler.reset()


def with_state(checkpoint: Any) -> Any:
    """A checkpoint function of transformers that gives each recomputation the state of its forward.

    Raises:
        OptionError: if it is reentrant.
    """
    options = getattr(checkpoint, "keywords", {})
    if options.get("use_reentrant") is not False:
        raise OptionError(
            f"use_reentrant must be False, got {options.get('use_reentrant')!r}: reentrant checkpointing runs the "
            "layers without a graph, so that no balance loss reaches a gate"
        )
    return functools.partial(checkpoint, context_fn=checkpoint_context)


@contextlib.contextmanager
def listen(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of every forward call of the model inside of the ``with``; also if it was compiled before.

    Args:
        model: with mixtures of ours or native ones, also under PEFT and DistributedDataParallel.
        listener: what is told.

    Raises:
        OptionError: if the model checkpoints activations reentrantly.
    """
    attach_state(model)
    listeners = _LISTENERS.setdefault(decoder(model), [])
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)


def is_listened_to(model: nn.Module) -> bool:
    """Whether anyone listens to the forward calls of a model now."""
    return bool(_LISTENERS.get(decoder(model)))


def is_own_hook(hook: Any) -> bool:
    """Whether a hook of a module is one that ``attach_state`` has put there; without a listener they change nothing."""
    return hook in (_open_state, _close_state) or is_native_hook(hook)


class _States(Listener, list[RouterState]):
    """Keeps the state of every call."""

    def opened(self, state: RouterState, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Append it."""
        self.append(state)


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[list[RouterState]]:
    """List that gets one ``RouterState`` for every forward call of the model inside of the ``with``.

    The routings on ``state.tape`` keep their graph, so a loss of them reaches the gates.

    Args:
        model: with mixtures of ours or native ones, also under PEFT and DistributedDataParallel.

    Raises:
        OptionError: if the model checkpoints activations reentrantly.
    """
    states = _States()
    with listen(model, states):
        yield states


def padding_mask(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Which tokens of a base model's call are real, (T,); None if nothing says so.

    A mask has (B, past + Q), and the last Q count; or (B, 1, Q, keys) with a static cache, where position q sees itself
    at key past + q unless it is padding, or among the last Q keys if a sliding window holds no more; or it is a
    dictionary of such masks by kind of layer.
    """
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(mask, torch.Tensor) or tokens is None:
        return None
    B, Q = tokens.shape[:2]
    if mask.ndim == 2:
        return mask[:, -Q:].expand(B, Q).reshape(-1).bool()
    past, keys = past_length(kwargs), mask.shape[-1]
    begin = past if past + Q <= keys else keys - Q
    own_BQ = mask[:, 0, :, begin : begin + Q].diagonal(dim1=-2, dim2=-1)
    real_BQ = own_BQ if own_BQ.dtype == torch.bool else own_BQ == 0
    return real_BQ.expand(B, Q).reshape(-1)


def past_length(kwargs: Mapping[str, Any]) -> int:
    """Positions that the cache of a decoder's call holds already."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # layers of linear attention alone, which count no positions
        return _past_by_mask(kwargs)


def _past_by_mask(kwargs: Mapping[str, Any]) -> int:
    """What the mask, or else the positions, of a call say about those before it."""
    mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and tokens is not None and mask.shape[1] > tokens.shape[1]:
        return int(mask.shape[1] - tokens.shape[1])
    return int(position[..., 0].max()) if isinstance(position, torch.Tensor) else 0


@torch.compiler.disable(reason="a state belongs to one forward call; compile without fullgraph=True")
def _open_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tokens = kwargs.get("input_ids", args[0] if args else None)
    like = kwargs.get("inputs_embeds") if tokens is None else tokens
    state = RouterState(
        mask_T=padding_mask(args, kwargs),
        token_T=tokens.reshape(-1) if isinstance(tokens, torch.Tensor) else None,
        rows=1 if like is None else len(like),
        past=past_length(kwargs),
    )
    set_state(state)
    try:
        for listener in _LISTENERS.get(module, ()):
            listener.opened(state, args, kwargs)
    except BaseException:
        set_state(None)  # torch calls no other hook then
        raise


@torch.compiler.disable(reason="a state belongs to one forward call; compile without fullgraph=True")
def _close_state(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    state = current_state()
    set_state(None)
    if state is not None:
        for listener in _LISTENERS.get(module, ()):
            listener.closed(state)
