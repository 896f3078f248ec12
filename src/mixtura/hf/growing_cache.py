"""A cache that grows in place: what transformers concatenates at every token is written where there is room already.

B rows, V heads of keys, L positions, P width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer


class GrowingLayer(DynamicLayer):
    """Keys and values at the beginning of buffers that are twice as long as needed when they are made.

    Anything else that ``DynamicLayer`` does (reordering, repeating rows) works on ``keys`` and ``values``, and the next
    update moves what came out into new buffers. States that need a gradient are concatenated as ever.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._buffers: dict[str, torch.Tensor | None] = {}
        self._lengths = {"keys": 0, "values": 0}
        self._own: set[str] = set()  # buffers that nobody else can hold
        super().__init__(**kwargs)

    @property
    def keys(self) -> torch.Tensor | None:
        """(B, V, L, P)."""
        return self._view("keys")

    @keys.setter
    def keys(self, tensor: torch.Tensor | None) -> None:
        self._set("keys", tensor)

    @property
    def values(self) -> torch.Tensor | None:
        """(B, V, L, P)."""
        return self._view("values")

    @values.setter
    def values(self, tensor: torch.Tensor | None) -> None:
        self._set("values", tensor)

    def get_seq_length(self) -> int:
        """L."""
        return self._lengths["keys"]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, and return all keys and values."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, more = self.get_seq_length(), key_states.shape[-2]
        buffers = self.reserve(more, key_states, value_states)
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin : begin + more] = states
        self.count(more)
        return self.keys, self.values  # type: ignore[return-value]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget so many positions at the end, which is 0 or negative; the buffers stay."""
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)  # refuses it
        self.count(max(tokens_to_remove, -self.get_seq_length()))

    def reserve(self, more: int, like_keys: torch.Tensor, like_values: torch.Tensor) -> list[torch.Tensor]:
        """Make room for so many positions behind those that are there.

        Args:
            more: positions.
            like_keys: (B, V, any, P), of the type that is stored.
            like_values: the same of values.

        Returns:
            Buffers of keys and values, (B, V, capacity, P) each and contiguous, to be written to from L on.
        """
        return [self._room("keys", more, like_keys), self._room("values", more, like_values)]

    def count(self, more: int) -> None:
        """So many positions were written behind the others, or if negative are forgotten."""
        self._lengths = {name: length + more for name, length in self._lengths.items()}

    def _room(self, name: str, more: int, like: torch.Tensor) -> torch.Tensor:
        buffer, length = self._buffers[name], self._lengths[name]
        if name in self._own and length + more <= buffer.shape[2]:  # type: ignore[union-attr]
            return buffer  # type: ignore[return-value]
        grown = like.new_empty(*like.shape[:2], max(2 * (length + more), 64), like.shape[3])
        if length:
            grown[:, :, :length] = buffer[:, :, :length]  # type: ignore[index]
        self._buffers[name] = grown
        self._own.add(name)
        return grown

    def _view(self, name: str) -> torch.Tensor | None:
        buffer = self._buffers[name]
        return buffer if buffer is None or buffer.ndim != 4 else buffer[:, :, : self._lengths[name]]

    def _set(self, name: str, tensor: torch.Tensor | None) -> None:
        self._buffers[name] = tensor
        self._own.discard(name)
        self._lengths[name] = 0 if tensor is None or tensor.ndim != 4 else tensor.shape[2]


def grow(cache: Cache) -> bool:
    """Let the layers of a cache grow in place; those of other kinds (sliding, quantized, static) stay as they are.

    Returns:
        Whether all of them grow in place now.
    """
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = _growing(layer)
    return all(type(layer) is GrowingLayer for layer in cache.layers)


def _growing(layer: DynamicLayer) -> GrowingLayer:
    made = GrowingLayer()
    if layer.is_initialized:
        made.lazy_initialization(layer.keys, layer.values)  # type: ignore[arg-type]
        made.keys, made.values = layer.keys, layer.values
    return made
