"""One ``RouterState`` for every forward call of a model: opened by a hook on the decoder, and recorded on demand.

B sequences, Q positions of this call, T = B Q tokens, row by row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mixtura.hf.sites import decoder
from mixtura.nn.state import RouterState, current_state, set_state


def attach_state(model: nn.Module) -> None:
    """Make every forward call of the decoder of ``model`` open a state of its own; twice is once."""
    inner = decoder(model)
    if _open_state in inner._forward_pre_hooks.values():
        return
    inner.register_forward_pre_hook(_open_state, with_kwargs=True)
    inner.register_forward_hook(_close_state, always_call=True)


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[list[RouterState]]:
    """List that gets one ``RouterState`` for every forward call of the model inside of the ``with``.

    The routings on ``state.tape`` keep their graph, so a loss of them reaches the gates.

    Args:
        model: of the family mixtura, also under PEFT.
    """
    states: list[RouterState] = []

    def append(*_: Any) -> None:
        state = current_state()
        if state is not None:
            states.append(state)

    handle = decoder(model).register_forward_pre_hook(append)
    try:
        yield states
    finally:
        handle.remove()


def padding_mask(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Which tokens of a base model's call are real, (T,); None if nothing says so.

    A mask has (B, past + Q), and the last Q count; or (B, 1, Q, keys) with a static cache, where position q sees itself
    at key past + q unless it is padding; or it is a dictionary of such masks by kind of layer.
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
    past = past_length(kwargs)
    own_BQ = mask[:, 0, :, past : past + Q].diagonal(dim1=-2, dim2=-1)
    real_BQ = own_BQ if own_BQ.dtype == torch.bool else own_BQ == 0
    return real_BQ.expand(B, Q).reshape(-1)


def past_length(kwargs: Mapping[str, Any]) -> int:
    """Positions that the cache of a decoder's call holds already."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _open_state(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    set_state(RouterState(mask_T=padding_mask(args, kwargs)))


def _close_state(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    set_state(None)
