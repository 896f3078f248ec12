"""A cache that grows in place: what transformers concatenates at every token is written where there is room already.

B rows, V heads of keys, L positions, P width of a head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

Form: TypeAlias = tuple[torch.dtype, torch.device, int, int, int]


def form_of(states: torch.Tensor) -> Form:
    """Type, device, B, V and P."""
    B, V, _, P = states.shape
    return states.dtype, states.device, B, V, P


@dataclasses.dataclass
class _Held:
    """What is held of a buffer (B, V, capacity, P): so many positions from the first one on.

    Attributes:
        own: whether nobody else can hold the buffer.
        lent: whether somebody was given what is held; what lies there must stay then.
    """

    buffer: torch.Tensor | None = None
    first: int = 0
    length: int = 0
    own: bool = False
    lent: bool = False

    def __post_init__(self) -> None:
        self.form = None if self.buffer is None or self.buffer.ndim != 4 else form_of(self.buffer)

    @property
    def end(self) -> int:
        return self.first + self.length

    def view(self) -> torch.Tensor | None:
        buffer = self.buffer
        return buffer if buffer is None or buffer.ndim != 4 else buffer[:, :, self.first : self.end]

    def lend(self) -> torch.Tensor | None:
        self.lent = True
        return self.view()

    def drop(self, count: int) -> None:
        """Forget so many positions at the end."""
        self.length -= count
        self.own &= not (self.lent and count)

    def room(self, more: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer that has room for so many positions behind the end; what is held fits already."""
        if self.own and self.end + more <= self.buffer.shape[2] and (self.length or self.form == form_of(like)):  # type: ignore[union-attr]
            return self.buffer  # type: ignore[return-value]
        grown = _empty(like, max(2 * (self.length + more), 64))
        if self.length:
            grown[:, :, : self.length] = self.view()
        self.buffer, self.form, self.first, self.own, self.lent = grown, form_of(grown), 0, True, False
        return grown


class Growing(DynamicLayer):
    """Keys and values in buffers that are twice as long as needed when they are made; the base of the layers below.

    Anything else that a layer of transformers does (reordering, repeating rows) works on ``keys`` and ``values``, and
    the next update moves what came out into new buffers. States that need a gradient are concatenated as ever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._keys, self._values = _Held(), _Held()
        super().__init__(*args, **kwargs)

    @property
    def keys(self) -> torch.Tensor | None:
        """(B, V, L, P)."""
        return self._keys.lend()

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._keys = _held(tensor)

    @property
    def values(self) -> torch.Tensor | None:
        """(B, V, L, P)."""
        return self._values.lend()

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._values = _held(tensor)

    @property
    def skipped(self) -> int:
        """Position of the sequence at which the buffers begin; negative if something else stands before it."""
        return self.get_seq_length() - self._keys.end

    def fits(self, keys: Form, values: Form) -> bool:
        """Whether states of these forms can stand behind those that are there."""
        if not self._keys.length:
            return True
        return self._keys.form == keys and self._values.form == values

    def reserve(self, more: int, like_keys: torch.Tensor, like_values: torch.Tensor) -> list[torch.Tensor]:
        """Make room for so many positions behind those that are there.

        Args:
            more: positions.
            like_keys: (B, V, any, P), of the type that is stored; they must fit.
            like_values: the same of values.

        Returns:
            Buffers of keys and values, (B, V, capacity, P) each and contiguous, to be written to from the next position
            on; position ``skipped`` is at their beginning.
        """
        if not self.is_initialized:
            self.lazy_initialization(like_keys, like_values)
        return [self._keys.room(more, like_keys), self._values.room(more, like_values)]

    def count(self, more: int) -> None:
        """So many positions were written behind the others."""
        for held in (self._keys, self._values):
            held.length += more

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        more = key_states.shape[-2]
        buffers = self.reserve(more, key_states, value_states)
        for held, buffer, states in zip((self._keys, self._values), buffers, (key_states, value_states), strict=True):
            buffer[:, :, held.end : held.end + more] = states


class GrowingLayer(Growing):
    """All positions."""

    def get_seq_length(self) -> int:
        """L."""
        return self._keys.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values."""
        if _need_gradient(key_states, value_states) or not self.fits(form_of(key_states), form_of(value_states)):
            return super().update(key_states, value_states, *args, **kwargs)
        self._append(key_states, value_states)
        self.count(key_states.shape[-2])
        return self._keys.view(), self._values.view()  # type: ignore[return-value]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many positions at the end, which is 0 or negative; the buffers stay."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # refuses it
        for held in (self._keys, self._values):
            held.drop(min(-tokens_to_remove, held.length))


class GrowingWindowLayer(Growing, DynamicSlidingWindowLayer):
    """As many positions as the window reaches; older ones are left behind when the buffers are moved."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values that some of these queries see."""
        more = key_states.shape[-2]
        concatenated = more >= self.sliding_window or _need_gradient(key_states, value_states)
        if concatenated or not self.fits(form_of(key_states), form_of(value_states)):
            return super().update(key_states, value_states, *args, **kwargs)
        self._append(key_states, value_states)
        seen = min(self._keys.length, self.sliding_window - 1) + more
        self.count(more)
        return tuple(held.buffer[:, :, held.end - seen : held.end] for held in (self._keys, self._values))  # type: ignore[index, return-value]

    def count(self, more: int) -> None:
        """So many positions were written behind the others; those that no later query sees are forgotten."""
        super().count(more)
        self.cumulative_length += more
        surplus = self._keys.length - self.sliding_window + 1
        if surplus > 0 and not self.record_past:
            for held in (self._keys, self._values):
                held.first, held.length = held.first + surplus, held.length - surplus


def grow(cache: Cache) -> bool:
    """Let the layers of a cache grow in place; those of other kinds (states, quantized, static) stay as they are.

    Returns:
        Whether all of them grow in place now.
    """
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for i, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            cache.layers[i] = _growing(layer)
    return all(isinstance(layer, Growing) for layer in cache.layers)


def _growing(layer: Any) -> Growing:
    made: Growing
    if isinstance(layer, DynamicSlidingWindowLayer):
        made = GrowingWindowLayer(layer.sliding_window)
        made.cumulative_length, made.record_past = layer.cumulative_length, layer.record_past
    else:
        made = GrowingLayer()
    if layer.is_initialized:
        made.lazy_initialization(layer.keys, layer.values)
        made.keys, made.values = layer.keys, layer.values
    return made


def _held(tensor: torch.Tensor | None) -> _Held:
    return _Held(tensor, length=0 if tensor is None or tensor.ndim != 4 else tensor.shape[2])


def _empty(like: torch.Tensor, capacity: int) -> torch.Tensor:
    """A buffer that can be written to in every mode; one that was made in inference mode could be in that alone."""
    shape = *like.shape[:2], capacity, like.shape[3]
    if not torch.is_inference_mode_enabled():
        return like.new_empty(shape)
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=like.dtype, device=like.device)


def _need_gradient(key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
