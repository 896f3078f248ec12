"""A cache that grows in place: what transformers concatenates at every token is written where there is room already.

B rows, V heads of keys, L positions, P width of a head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer


@dataclasses.dataclass
class _Held:
    """What is held of a buffer (B, V, capacity, P): so many positions from the first one on.

    Attributes:
        own: whether nobody else can hold the buffer.
    """

    buffer: torch.Tensor | None = None
    first: int = 0
    length: int = 0
    own: bool = False

    @property
    def end(self) -> int:
        return self.first + self.length

    def view(self) -> torch.Tensor | None:
        buffer = self.buffer
        return buffer if buffer is None or buffer.ndim != 4 else buffer[:, :, self.first : self.end]

    def room(self, more: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer that has room for so many positions behind the end."""
        if self.own and self.end + more <= self.buffer.shape[2]:  # type: ignore[union-attr]
            return self.buffer  # type: ignore[return-value]
        grown = like.new_empty(*like.shape[:2], max(2 * (self.length + more), 64), like.shape[3])
        if self.length:
            grown[:, :, : self.length] = self.view()
        self.buffer, self.first, self.own = grown, 0, True
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
        return self._keys.view()

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._keys = _held(tensor)

    @property
    def values(self) -> torch.Tensor | None:
        """(B, V, L, P)."""
        return self._values.view()

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._values = _held(tensor)

    @property
    def skipped(self) -> int:
        """Position of the sequence at which the buffers begin; negative if something else stands before it."""
        return self.get_seq_length() - self._keys.end

    def reserve(self, more: int, like_keys: torch.Tensor, like_values: torch.Tensor) -> list[torch.Tensor]:
        """Make room for so many positions behind those that are there.

        Args:
            more: positions.
            like_keys: (B, V, any, P), of the type that is stored.
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
        if _need_gradient(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        self._append(key_states, value_states)
        self.count(key_states.shape[-2])
        return self.keys, self.values  # type: ignore[return-value]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many positions at the end, which is 0 or negative; the buffers stay."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # refuses it
        self.count(max(tokens_to_remove, -self.get_seq_length()))


class GrowingWindowLayer(Growing, DynamicSlidingWindowLayer):
    """As many positions as the window reaches; older ones are left behind when the buffers are moved."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values that some of these queries see."""
        more = key_states.shape[-2]
        if more >= self.sliding_window or _need_gradient(key_states, value_states):
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


def _need_gradient(key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
