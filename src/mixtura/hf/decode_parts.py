"""Parts of a decoder as operations of a tape read them: projections, norms, feed-forwards, windows, rotations.

D width, P width of a head, R angles of a rotation.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from mixtura.core.errors import NotExpressibleError
from mixtura.nn.backends.native.activation import activation_number
from mixtura.nn.backends.native.tape import FewBits, Linear, Norm
from mixtura.nn.quantized_linear import QuantizedLinear

_ROTATIONS = ("default", "linear", "llama3", "yarn", "longrope")  # those that a position alone decides
_ANGLES = {  # what decides the angles, and nothing else
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor", "truncate"),
    *("original_max_position_embeddings", "max_position_embeddings", "mscale", "mscale_all_dim"),
    *("beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor"),
}
_PROJECTIONS = {"gate_proj", "up_proj", "gate_up_proj", "down_proj"}
_ACTIVATIONS = ("act_fn", "activation_fn")


class Positions:
    """Angles by which queries and keys are rotated, at each position below a count.

    Args:
        rotary: module of transformers that gives cosines and sines.
        count: positions.
    """

    def __init__(self, rotary: Any, count: int) -> None:
        self._rotary, self.count = rotary, count
        self._angles: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}
        self._given: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}
        self._borders: set[int] = set()

    def angles(self, layer_type: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (count, R) of the layers of a type, in float32.

        Raises:
            NotExpressibleError: if they depend on more than the position.
        """
        key = self._key(layer_type)
        if key not in self._angles:
            self._angles[key] = self._compute(key)
        return self._angles[key]

    def neighbors(self, attention: nn.Module, layer_type: str | None) -> bool:
        """Whether the function by which a module rotates takes neighbors, not halves; found by comparing values.

        Raises:
            NotExpressibleError: if it does something else.
        """
        cosine, sine = (angles[1] for angles in self.angles(layer_type))
        rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if rotate is None or list(inspect.signature(rotate).parameters)[:4] != ["q", "k", "cos", "sin"]:
            return False
        x = torch.arange(1.0, 2 * len(cosine) + 1)
        seen = rotate(x.view(1, 1, 1, -1), x.view(1, 1, 1, -1), *self._given[self._key(layer_type)])[0].flatten()
        for neighbors, (a, b) in ((False, x.chunk(2)), (True, (x[::2], x[1::2]))):
            pair = (a * cosine - b * sine, b * cosine + a * sine)
            if torch.allclose(torch.stack(pair, -1).flatten() if neighbors else torch.cat(pair), seen, atol=1e-4):
                return neighbors
        raise NotExpressibleError(f"{type(attention).__name__} rotates in a way that a plan does not know")

    def refusal(self, positions_B: torch.Tensor) -> str:
        """Why these positions cannot be in one step; "" if they can."""
        if bool((positions_B < 0).any()):
            return "a position is negative"
        for border in self._borders:
            if bool((positions_B < border).any()) and bool((positions_B >= border).any()):
                return f"sequences are on both sides of position {border}, where the rotation changes"
        return ""

    def _key(self, layer_type: str | None) -> str | None:
        return layer_type if isinstance(getattr(self._rotary, "rope_type", None), dict) else None

    def _compute(self, layer_type: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        kind, pieces = getattr(self._rotary, "rope_type", None), [torch.arange(self.count)[None]]
        kind = kind if layer_type is None else kind[layer_type]  # type: ignore[index]
        if kind not in _ROTATIONS:
            raise NotExpressibleError(
                f"positions of type {kind!r} are not those that a plan knows ({', '.join(_ROTATIONS)})"
            )
        parameters = self._rotary.config.rope_parameters
        parameters = parameters if layer_type is None else parameters[layer_type]
        if others := sorted(set(parameters) - _ANGLES):
            raise NotExpressibleError(f"a plan does not know what {', '.join(others)} of its positions mean")
        if kind == "longrope":  # behind a border all positions that are computed at once rotate otherwise
            border = int(parameters["original_max_position_embeddings"])
            self._borders.add(border)
            pieces = [piece for piece in (pieces[0][:, :border], pieces[0][:, border:]) if piece.numel()]
        options = {} if layer_type is None else {"layer_type": layer_type}
        made = [self._rotary(torch.zeros(1, 1, 1), piece, **options) for piece in pieces]
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in made):
            raise NotExpressibleError(f"{type(self._rotary).__name__} gives no cosines and sines")
        cosine, sine = (torch.cat(parts, 1)[0] for parts in zip(*made, strict=True))
        self._given[layer_type] = (cosine[None, 1:2], sine[None, 1:2])
        half = cosine.shape[-1] // 2
        for one, other in ((slice(half), slice(half, None)), (slice(0, None, 2), slice(1, None, 2))):
            if torch.equal(cosine[:, one], cosine[:, other]):  # each angle is given to both units that it rotates
                return cosine[:, one].contiguous(), sine[:, one].contiguous()
        return cosine, sine


def windows(model: Any) -> list[int]:
    """Positions that each layer of a decoder sees, 0 for all.

    Raises:
        NotExpressibleError: if the cache of a layer holds anything else than keys and values, or parts of a sequence.
    """
    config = model.config.get_text_config(decoder=True)
    found = []
    for number, layer in enumerate(DynamicCache(config=model.config).layers):
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else 0
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or (window and window != config.sliding_window):
            raise NotExpressibleError(
                f"layer {number}: its cache, a {type(layer).__name__}, is not one that a plan knows"
            )
        found.append(window)
    return found


@torch.no_grad()
def norm_of(module: Any) -> Norm | None:
    """A normalization; which one it is, and whether its weight is stored minus 1, is found by comparing values.

    Raises:
        NotExpressibleError: if it is no RMS or layer normalization.
    """
    if module is None:
        return None
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    others = {name for name, _ in module.named_parameters()} - {"weight", "bias"}
    if weight is not None and eps is not None and not others:
        x = torch.linspace(-2, 3, len(weight), dtype=weight.dtype)
        seen, wide = module(x).float(), x.float()
        plain = {"rms": F.rms_norm(wide, x.shape, eps=eps), "layer": F.layer_norm(wide, x.shape, eps=eps)}
        shift = 0.0 if bias is None else bias.float()
        off = {
            (kind, offset): float((made * (weight.float() + offset) + shift - seen).abs().max())
            for kind, made in plain.items()
            for offset in (0.0, 1.0)
        }
        kind, offset = min(off, key=lambda candidate: off[candidate])
        if off[kind, offset] <= 0.02 * (1 + float(seen.abs().max())):
            return Norm(kind, weight, bias, eps, offset)
    raise NotExpressibleError(f"{type(module).__name__} is no normalization that a plan knows")


def linear(module: nn.Module) -> Linear | FewBits:
    """A linear layer.

    Raises:
        NotExpressibleError: if it is another class, as that of an adapter.
    """
    if isinstance(module, QuantizedLinear):
        return module.few_bits()
    if type(module) is not nn.Linear:
        raise NotExpressibleError(f"{type(module).__name__} stands where a plan needs a plain Linear")
    return Linear(module.weight, module.bias)


def dense(
    module: nn.Module, where: str
) -> tuple[tuple[Linear | FewBits | None, Linear | FewBits, Linear | FewBits], int]:
    """Projections (gate or None, up, down) and activation of a gated or plain feed-forward.

    Raises:
        NotExpressibleError: if it has other parts or another activation.
    """
    check_parts(module, {*_PROJECTIONS, *_ACTIVATIONS}, where)
    functions = [getattr(module, name) for name in _ACTIVATIONS if hasattr(module, name)]
    number = activation_number(functions[0]) if functions else None
    if number is None:
        raise NotExpressibleError(f"{where}: its activation is not one that a plan knows")
    down = linear(module.down_proj)
    if hasattr(module, "gate_up_proj"):
        fused = linear(module.gate_up_proj)
        return (fused.rows(0, fused.out // 2), fused.rows(fused.out // 2, fused.out), down), number
    gate = linear(module.gate_proj) if hasattr(module, "gate_proj") else None
    return (gate, linear(module.up_proj), down), number


def check_parts(module: nn.Module, known: Iterable[str], where: str) -> None:
    """Raise ``NotExpressibleError`` if a module has children of other names."""
    if others := sorted({name for name, _ in module.named_children()} - set(known)):
        raise NotExpressibleError(f"{where} ({type(module).__name__}) has parts that a plan does not know: {others}")
