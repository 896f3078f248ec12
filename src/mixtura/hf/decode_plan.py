"""From the structure of a decoder to a tape: what its modules compute for one token a sequence, one by one.

Parts are known by their names and by what they hold; whatever else is there is refused by name, and so is a model with
a parameter that no operation reads. That the tape computes what the modules do is measured before it is used
(``mixtura.hf.accelerate``).

B rows (sequences), D width, E experts, P width of a head, R angles of a rotation, L positions in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import NotExpressibleError
from mixtura.hf.native import NativeMixture, expert_blocks
from mixtura.hf.native_start import linear_gate
from mixtura.hf.selection import LayerSelection, layer_selections
from mixtura.hf.sites import Holder, decoder
from mixtura.nn.backends.native.activation import activation_number
from mixtura.nn.backends.native.experts import experts_struct, why_not
from mixtura.nn.backends.native.quantized import quantized_struct, why_not_quantized
from mixtura.nn.backends.native.tape import FewBits, Linear, Norm, Tape
from mixtura.nn.experts.quantized import QuantizedExperts
from mixtura.nn.mixture import Mixture
from mixtura.nn.quantized_linear import QuantizedLinear
from mixtura.nn.routers.base import LinearGate

_ROTATIONS = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the length
_OUTSIDE = {"model", "lm_head"}
_INSIDE = {"embed_tokens", "layers", "norm", "rotary_emb"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
_LAYERS = [{"self_attn", "input_layernorm", "post_attention_layernorm", n} for n in ("mlp", "block_sparse_moe")]
_SHARED = ("shared_expert", "shared_experts")


class DecodePlan:
    """The tape of a decoder, for some number of sequences.

    Args:
        model: causal language model of transformers or of the family, in evaluation.
        rows: B.
        positions: as many as the cache is to hold at least.

    Raises:
        NotExpressibleError: if a part of it is not known, with its name.
    """

    def __init__(self, model: Any, rows: int, positions: int) -> None:
        self.tape = Tape(model.get_input_embeddings().weight.dtype, rows)
        self.rows = rows
        self._angles = _angles(model, max(positions, 1024))
        self._selections = layer_selections(model)
        self._blocks = expert_blocks(model)
        inner = decoder(model)
        _check_parts(model, _OUTSIDE, "the model")
        _check_parts(inner, _INSIDE, "the decoder")
        x_BD = self.tape.embed(inner.embed_tokens.weight)
        for number, layer in enumerate(inner.layers):
            self._layer(str(number), layer, x_BD)
        (self.logits_BV,) = self.tape.linears(x_BD, _norm(inner.norm), [_linear(model.lm_head)])
        _check_whole(model, self.tape.used)

    def step(self, ids_B: torch.Tensor, positions_B: torch.Tensor, starts_B: torch.Tensor, layers: list[Any]) -> Any:
        """Logits (B, V) of the next token, in the type of the model.

        Args:
            ids_B: tokens.
            positions_B: their positions for the rotation.
            starts_B: first position of the cache that is no padding, of each row.
            layers: the ``GrowingLayer`` of each decoder layer; each gets one position more.
        """
        tape, length = self.tape, layers[0].get_seq_length() + 1
        tape.ids_B.copy_(ids_B), tape.positions_B.copy_(positions_B), tape.starts_B.copy_(starts_B)
        for number, layer in enumerate(layers):
            tape.cache(number, *layer.reserve(1, *self._like))
        tape.run(length)
        for layer in layers:
            layer.count(1)
        return self.logits_BV.to(tape.dtype, copy=True)

    def reaches(self, position: int) -> bool:
        """Whether the angles of that position are known."""
        return position < len(self._angles[0])

    def _layer(self, name: str, layer: nn.Module, x_BD: torch.Tensor) -> None:
        children = {child for child, _ in layer.named_children()}
        if children not in _LAYERS:
            raise NotExpressibleError(
                f"layer {name}: {type(layer).__name__} has the parts {', '.join(sorted(children))}"
            )
        self._attention(name, layer, x_BD)
        norm = _norm(layer.post_attention_layernorm)
        feed = layer.mlp if "mlp" in children else layer.block_sparse_moe
        mixture = feed.mixture if isinstance(feed, Holder) else None
        if isinstance(feed, Holder) and feed.dropout is not None and type(feed.dropout) is not nn.Identity:
            raise NotExpressibleError(f"layer {name}: it has dropout")
        if mixture is not None:
            self._mixture(name, mixture, norm, x_BD)
        elif name in self._blocks:
            self._native(name, self._blocks[name], norm, x_BD)
        else:
            self.tape.feed_forward(x_BD, norm, *_dense(feed, f"layer {name}"), x_BD)

    def _attention(self, name: str, layer: nn.Module, x_BD: torch.Tensor) -> None:
        attention = layer.self_attn
        _check_parts(attention, _ATTENTION, f"the attention of layer {name}")
        if getattr(attention, "sliding_window", None):
            raise NotExpressibleError(f"layer {name}: its attention has a sliding window")
        width = attention.head_dim
        projections = [_linear(getattr(attention, part)) for part in ("q_proj", "k_proj", "v_proj")]
        query, key, value = self.tape.linears(x_BD, _norm(layer.input_layernorm), projections)
        norms = tuple(_norm(getattr(attention, part, None)) for part in ("q_norm", "k_norm"))
        whole = norms[0] is not None and norms[0].weight is not None and len(norms[0].weight) != width
        out = self.tape.attention(
            query, key, value, width=width, angles=self._angles, scale=attention.scaling, norms=norms, whole=whole
        )
        self.tape.linear_add(out, _linear(attention.o_proj), x_BD)
        heads = key.shape[1] // width
        like = torch.empty(self.tape.rows, heads, 0, width, dtype=self.tape.dtype)
        self._like = (like, like)

    def _mixture(self, name: str, mixture: Mixture, norm: Norm | None, x_BD: torch.Tensor) -> None:
        gate = mixture.router.gate
        if not isinstance(gate, LinearGate):
            raise NotExpressibleError(f"layer {name}: the gate of its router is no linear one")
        h_BD = self.tape.norm(x_BD, norm)  # type: ignore[arg-type]
        self._experts(self._selections[name], Linear(gate.weight, gate.bias), mixture.experts, h_BD, x_BD)
        if mixture.shared is not None:
            self.tape.feed_forward(h_BD, None, *_dense(mixture.shared, f"layer {name}: the shared expert"), x_BD)

    def _native(self, name: str, block: NativeMixture, norm: Norm | None, x_BD: torch.Tensor) -> None:
        shared = [part for part in _SHARED if hasattr(block.block, part)]
        _check_parts(block.block, {block.router_name, "experts", "shared_expert_gate", *shared}, f"layer {name}")
        h_BD = self.tape.norm(x_BD, norm)  # type: ignore[arg-type]
        self._experts(self._selections[name], Linear(*linear_gate(block, name)), block.experts, h_BD, x_BD)
        for part in shared:
            by_row = None
            if hasattr(block.block, "shared_expert_gate"):
                (by_row,) = self.tape.linears(h_BD, None, [_linear(block.block.shared_expert_gate)])
            dense = _dense(getattr(block.block, part), f"layer {name}: {part}")
            self.tape.feed_forward(h_BD, None, *dense, x_BD, by_row)

    def _experts(
        self, selection: LayerSelection, gate: Linear, experts: nn.Module, h_BD: torch.Tensor, x_BD: torch.Tensor
    ) -> None:
        spec = selection.require("a plan")
        quantized = isinstance(experts, QuantizedExperts)
        if reason := why_not_quantized(experts, h_BD, h_BD) if quantized else why_not(experts, h_BD):
            raise NotExpressibleError(f"layer {selection.layer}: {reason}")
        struct = quantized_struct(experts, h_BD.dtype) if quantized else experts_struct(experts)
        (logits_BE,) = self.tape.linears(h_BD, None, [gate])
        self.tape.mixture(h_BD, logits_BE, spec, selection.bias_E, struct, x_BD)
        self.tape.used += list(experts.parameters())


def _norm(module: nn.Module | None) -> Norm | None:
    if module is None:
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm("layer", module.weight, module.bias, module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or eps is None or len(list(module.parameters())) != 1:
        raise NotExpressibleError(f"{type(module).__name__} is no normalization that a plan knows")
    x = torch.linspace(-2, 3, len(module.weight), dtype=module.weight.dtype)
    plain = torch.nn.functional.rms_norm(x.float(), x.shape, eps=eps)
    offset = min((0.0, 1.0), key=lambda o: float((plain * (module.weight.float() + o) - module(x).float()).abs().max()))
    return Norm("rms", module.weight, None, eps, offset)


def _linear(module: nn.Module) -> Linear | FewBits:
    if isinstance(module, QuantizedLinear):
        return module.few_bits()
    if type(module) is not nn.Linear:
        raise NotExpressibleError(f"{type(module).__name__} stands where a plan needs a plain Linear")
    return Linear(module.weight, module.bias)


def _dense(
    module: nn.Module, where: str
) -> tuple[tuple[Linear | FewBits | None, Linear | FewBits, Linear | FewBits], int]:
    """Projections and activation of a gated or plain feed-forward."""
    _check_parts(module, {"gate_proj", "up_proj", "down_proj", "act_fn"}, where)
    gate = getattr(module, "gate_proj", None)
    number = activation_number(module.act_fn)
    if number is None:
        raise NotExpressibleError(f"{where}: its activation is not one that a plan knows")
    return (None if gate is None else _linear(gate), _linear(module.up_proj), _linear(module.down_proj)), number


def _check_parts(module: nn.Module, known: Iterable[str], where: str) -> None:
    if others := sorted({name for name, _ in module.named_children()} - set(known)):
        raise NotExpressibleError(f"{where} ({type(module).__name__}) has parts that a plan does not know: {others}")


def _check_whole(model: nn.Module, used: Iterable[torch.Tensor]) -> None:
    read = {tensor.data_ptr() for tensor in used}
    if unread := [name for name, tensor in model.named_parameters() if tensor.data_ptr() not in read]:
        raise NotExpressibleError(f"no operation of a plan reads {', '.join(unread[:3])} ({len(unread)} in all)")


def _angles(model: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (positions, R) in float32."""
    rotary = getattr(decoder(model), "rotary_emb", None)
    kind = getattr(rotary, "rope_type", None)
    if kind not in _ROTATIONS:
        raise NotExpressibleError(
            f"positions of type {kind!r} are not those that a plan knows ({', '.join(_ROTATIONS)})"
        )
    place = torch.arange(positions, device=model.device)[None]
    made = rotary(torch.zeros(1, 1, 1, device=model.device), place)
    if not isinstance(made, tuple) or len(made) != 2:
        raise NotExpressibleError(f"{type(rotary).__name__} gives no cosines and sines")
    cosine, sine = made
    half = cosine.shape[-1] // 2
    return cosine[0, :, :half].contiguous(), sine[0, :, :half].contiguous()
