"""From the structure of a decoder to a tape: what its modules compute for one token a sequence, one by one.

Parts are known by their names and by what they hold; whatever else is there is refused by name, and so is a model with
a parameter that no operation reads. That the tape computes what the modules do is measured before it is used
(``mixtura.hf.accelerate``).

B rows (sequences), D width, E experts, P width of a head, L positions in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import NotExpressibleError
from mixtura.hf.decode_parts import Positions, check_parts, dense, linear, norm_of, windows
from mixtura.hf.growing_cache import Form, form_of
from mixtura.hf.native import NativeMixture, expert_blocks
from mixtura.hf.native_start import linear_gate
from mixtura.hf.selection import LayerSelection, layer_selections
from mixtura.hf.sites import Holder, decoder
from mixtura.nn.backends.native.experts import experts_struct, why_not
from mixtura.nn.backends.native.quantized import quantized_struct, why_not_quantized
from mixtura.nn.backends.native.tape import Linear, Norm, Tape
from mixtura.nn.experts.quantized import QuantizedExperts
from mixtura.nn.mixture import Mixture
from mixtura.nn.routers.base import LinearGate

_OUTSIDE = {"model", "lm_head"}
_INSIDE = {"embed_tokens", "layers", "norm", "rotary_emb"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm", "rotary_emb"}
_FEEDS = {"mlp", "block_sparse_moe"}
_NORMS = (  # before attention, behind it, before the feed-forward, behind it
    ("input_layernorm", None, "post_attention_layernorm", None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)
_PARALLEL = {"input_layernorm"}  # attention and feed-forward read the same
_SHARED = ("shared_expert", "shared_experts")
_ROTATED_WINDOWS = {"cohere2", "cohere2_moe", "flint"}  # whose layers rotate only if they have a window
_CAPPED = {"gemma2", "vaultgemma"}  # of those with attn_logit_softcapping the ones whose attention applies it
_Entry = tuple[torch.Tensor, Norm | None]  # what enters products: x_BD with a norm, or of the weights' type without


class DecodePlan:
    """The tape of a decoder, for some number of sequences.

    Args:
        model: causal language model of transformers or of the family, in evaluation.
        rows: B.
        positions: as many as the rotation is to know at least.

    Attributes:
        windows: positions that each layer sees, 0 for all.

    Raises:
        NotExpressibleError: if a part of it is not known, with its name.
    """

    def __init__(self, model: Any, rows: int, positions: int) -> None:
        self.tape = Tape(model.get_input_embeddings().weight.dtype, rows)
        self.rows, self.windows = rows, windows(model)
        self._config = model.config.get_text_config(decoder=True)
        self._selections = layer_selections(model)
        self._blocks = expert_blocks(model)
        inner = decoder(model)
        check_parts(model, _OUTSIDE, "the model")
        check_parts(inner, _INSIDE, "the decoder")
        self._like: list[torch.Tensor] = []  # keys and values of each layer, without positions
        self._forms: list[Form] = []
        self._vocabulary = len(inner.embed_tokens.weight)
        self._positions = Positions(getattr(inner, "rotary_emb", None), max(positions, 1024))
        x_BD = self.tape.embed(inner.embed_tokens.weight, _embedding_scale(inner))
        self._sum_BD = self.tape.sum(x_BD.shape[1])
        for number, layer in enumerate(inner.layers):
            self._layer(number, layer, x_BD)
        (self._logits_BV,) = self.tape.linears(x_BD, norm_of(inner.norm), [linear(model.lm_head)])
        self._factor = (getattr(self._config, "logit_scale", None) or 1) / (
            getattr(self._config, "logits_scaling", None) or 1
        )
        self._cap = float(getattr(self._config, "final_logit_softcapping", None) or math.inf)
        _check_whole(model, self.tape.used)

    def step(self, ids_B: torch.Tensor, positions_B: torch.Tensor, starts_B: torch.Tensor, layers: list[Any]) -> Any:
        """Logits (B, V) of the next token, in the type of the model.

        Args:
            ids_B: tokens.
            positions_B: their positions for the rotation.
            starts_B: first position of the cache that is no padding, of each row.
            layers: the ``Growing`` of each decoder layer; each gets one position more.
        """
        tape, length = self.tape, layers[0].get_seq_length() + 1
        tape.ids_B.copy_(ids_B), tape.positions_B.copy_(positions_B), tape.starts_B.copy_(starts_B)
        for number, layer in enumerate(layers):
            tape.cache(number, *layer.reserve(1, self._like[number], self._like[number]), layer.skipped)
        tape.run(length)
        for layer in layers:
            layer.count(1)
        return self._logits().to(tape.dtype, copy=True)

    def reaches(self, positions_B: torch.Tensor) -> bool:
        """Whether rotations are known as far as these positions."""
        return int(positions_B.max()) < self._positions.count

    def refusal(self, ids_B: torch.Tensor, positions_B: torch.Tensor, layers: list[Any]) -> str:
        """Why the plan cannot take this step from there; "" if it can."""
        ids = ids_B.tolist()
        if ids_B.is_floating_point() or min(ids) < 0 or max(ids) >= self._vocabulary:
            return f"tokens are not of 0 .. {self._vocabulary - 1}"
        if len(layers) != len(self.windows):
            return f"the cache has {len(layers)} layers, the model {len(self.windows)}"
        for window, layer in zip(self.windows, layers, strict=True):
            if getattr(layer, "sliding_window", window) != window:
                return f"the cache has a window of {layer.sliding_window}, the model one of {window}"
        if not all(layer.fits(form, form) for layer, form in zip(layers, self._forms, strict=True)):
            return "the cache is of another shape or type than the model's"
        return self._positions.refusal(positions_B)

    def _logits(self) -> torch.Tensor:
        if self._factor == 1 and self._cap == math.inf:
            return self._logits_BV
        logits_BV = self._logits_BV * self._factor
        return logits_BV if self._cap == math.inf else torch.tanh(logits_BV / self._cap) * self._cap

    def _layer(self, number: int, layer: nn.Module, x_BD: torch.Tensor) -> None:
        name, parts = str(number), _parts_of_layer(layer)
        feeds, norms = parts & _FEEDS, parts - _FEEDS - {"self_attn"}
        order = next((order for order in _NORMS if norms == {n for n in order if n}), None)
        if "self_attn" not in parts or len(feeds) != 1 or (order is None and norms != _PARALLEL):
            raise NotExpressibleError(f"layer {name}: {type(layer).__name__} has the parts {', '.join(sorted(parts))}")
        factor = float(getattr(layer, "residual_multiplier", 1.0))
        if order is None:
            entry: _Entry = (self.tape.norm(x_BD, norm_of(layer.input_layernorm)), None)
            self._added(x_BD, None, factor, lambda out_BD: self._attention(number, layer, entry, out_BD))
            self._added(x_BD, None, factor, lambda out_BD: self._feed(name, layer, entry, out_BD))
            return
        before, behind, before_feed, behind_feed = (norm_of(getattr(layer, n) if n else None) for n in order)
        entered = self._entry(x_BD, before)
        self._added(x_BD, behind, factor, lambda out_BD: self._attention(number, layer, entered, out_BD))
        entering = self._entry(x_BD, before_feed)
        self._added(x_BD, behind_feed, factor, lambda out_BD: self._feed(name, layer, entering, out_BD))

    def _entry(self, x_BD: torch.Tensor, norm: Norm | None) -> _Entry:
        return (x_BD, norm) if norm is not None else (self.tape.norm(x_BD, None), None)

    def _added(
        self, x_BD: torch.Tensor, norm: Norm | None, factor: float, operation: Callable[[torch.Tensor], None]
    ) -> None:
        """x += factor times what the operation adds to its argument, normalized."""
        if norm is None and factor == 1:
            return operation(x_BD)
        operation(self._sum_BD)
        return self.tape.fold(self._sum_BD, norm, x_BD, factor)

    def _attention(self, number: int, layer: nn.Module, entry: _Entry, out_BD: torch.Tensor) -> None:
        attention, where = layer.self_attn, f"the attention of layer {number}"
        check_parts(attention, _ATTENTION, where)
        width, window = attention.head_dim, self.windows[number]
        if (getattr(attention, "sliding_window", window) or 0) != window:
            raise NotExpressibleError(f"{where} has a window of {attention.sliding_window}, its cache one of {window}")
        cap = getattr(attention, "attn_logit_softcapping", None)
        if cap and self._family() not in _CAPPED:
            raise NotExpressibleError(f"{where} bounds its scores in a way that is not known")
        query, key, value = self.tape.linears(*entry, _projections(attention))
        norms = tuple(norm_of(getattr(attention, part, None)) for part in ("q_norm", "k_norm"))
        whole = norms[0] is not None and norms[0].weight is not None and len(norms[0].weight) != width
        rotates, kind = getattr(attention, "use_rope", True), self._kind(number)
        if self._family() in _ROTATED_WINDOWS:
            rotates = window or getattr(attention, "force_rope", False)
        mixed_BN = self.tape.attention(
            query,
            key,
            value,
            width=width,
            angles=self._positions.angles(kind) if rotates else None,
            neighbors=bool(rotates) and self._positions.neighbors(attention, kind),
            scale=attention.scaling,
            norms=norms,
            whole=whole,
            window=window,
            softcap=cap or 0.0,
            sinks_H=getattr(attention, "sinks", None),
        )
        self.tape.linear_add(mixed_BN, linear(attention.o_proj), out_BD)
        like = torch.empty(self.tape.rows, key.shape[1] // width, 0, width, dtype=self.tape.dtype)
        self._like.append(like)
        self._forms.append(form_of(like))

    def _family(self) -> str:
        return getattr(self._config, "base_model_type", None) or self._config.model_type

    def _kind(self, number: int) -> str | None:
        kinds = getattr(self._config, "layer_types", None)
        return None if kinds is None else kinds[number]

    def _feed(self, name: str, layer: nn.Module, entry: _Entry, out_BD: torch.Tensor) -> None:
        feed = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
        if isinstance(feed, Holder) and feed.dropout is not None and type(feed.dropout) is not nn.Identity:
            raise NotExpressibleError(f"layer {name}: it has dropout")
        if isinstance(feed, Holder):
            self._mixture(name, feed.mixture, self._typed(entry), out_BD)
        elif name in self._blocks:
            self._native(name, self._blocks[name], self._typed(entry), out_BD)
        else:
            self.tape.feed_forward(*entry, *dense(feed, f"layer {name}"), out_BD)

    def _typed(self, entry: _Entry) -> torch.Tensor:
        x_BD, norm = entry
        return x_BD if norm is None else self.tape.norm(x_BD, norm)

    def _mixture(self, name: str, mixture: Mixture, h_BD: torch.Tensor, out_BD: torch.Tensor) -> None:
        gate = mixture.router.gate
        if not isinstance(gate, LinearGate):
            raise NotExpressibleError(f"layer {name}: the gate of its router is no linear one")
        self._experts(self._selections[name], Linear(gate.weight, gate.bias), mixture.experts, h_BD, out_BD)
        if mixture.shared is not None:
            self.tape.feed_forward(h_BD, None, *dense(mixture.shared, f"layer {name}: the shared expert"), out_BD)

    def _native(self, name: str, block: NativeMixture, h_BD: torch.Tensor, out_BD: torch.Tensor) -> None:
        shared = [part for part in _SHARED if hasattr(block.block, part)]
        check_parts(block.block, {block.router_name, "experts", "shared_expert_gate", *shared}, f"layer {name}")
        self._experts(self._selections[name], Linear(*linear_gate(block, name)), block.experts, h_BD, out_BD)
        for part in shared:
            by_row = None
            if hasattr(block.block, "shared_expert_gate"):
                (by_row,) = self.tape.linears(h_BD, None, [linear(block.block.shared_expert_gate)])
            self.tape.feed_forward(
                h_BD, None, *dense(getattr(block.block, part), f"layer {name}: {part}"), out_BD, by_row
            )

    def _experts(
        self, selection: LayerSelection, gate: Linear, experts: nn.Module, h_BD: torch.Tensor, out_BD: torch.Tensor
    ) -> None:
        spec = selection.require("a plan")
        quantized = isinstance(experts, QuantizedExperts)
        if reason := why_not_quantized(experts, h_BD, h_BD) if quantized else why_not(experts, h_BD):
            raise NotExpressibleError(f"layer {selection.layer}: {reason}")
        struct = quantized_struct(experts, h_BD.dtype) if quantized else experts_struct(experts)
        (logits_BE,) = self.tape.linears(h_BD, None, [gate])
        self.tape.mixture(h_BD, logits_BE, spec, selection.bias_E, struct, out_BD)
        self.tape.used += list(experts.parameters())


def _parts_of_layer(layer: nn.Module) -> set[str]:
    return {name for name, child in layer.named_children() if not isinstance(child, nn.Dropout | nn.Identity)}


def _embedding_scale(inner: Any) -> float:
    """What rows of the embeddings are multiplied with; a family has it in the embeddings or in the decoder."""
    scale = torch.as_tensor(getattr(inner.embed_tokens, "embed_scale", 1.0)).to(inner.embed_tokens.weight.dtype)
    return float(scale) * float(getattr(inner, "embedding_multiplier", 1.0))


def _projections(attention: nn.Module) -> list[Any]:
    """Of queries, keys and values; a fused projection is parted."""
    if not hasattr(attention, "qkv_proj"):
        return [linear(getattr(attention, part)) for part in ("q_proj", "k_proj", "v_proj")]
    fused = linear(attention.qkv_proj)
    queries = attention.o_proj.in_features
    keys = (fused.out - queries) // 2
    return [fused.rows(*span) for span in ((0, queries), (queries, queries + keys), (queries + keys, fused.out))]


def _check_whole(model: nn.Module, used: Iterable[torch.Tensor]) -> None:
    read = {tensor.data_ptr() for tensor in used}
    if unread := [name for name, tensor in model.named_parameters() if tensor.data_ptr() not in read]:
        raise NotExpressibleError(f"no operation of a plan reads {', '.join(unread[:3])} ({len(unread)} in all)")
