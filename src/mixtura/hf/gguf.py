"""A Llama in a GGUF file as model and tokenizer, weights dequantized to float32.

H heads, R dimensions of a head.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtura.core.errors import FileFormatError, MixturaError, NotExpressibleError

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SPECIAL = 3  # token type "control"


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Read model and tokenizer.

    Args:
        path: of the file.
        dtype: of the weights.

    Raises:
        FileFormatError: if it is no GGUF file, or cut off.
        NotExpressibleError: if it holds another architecture than Llama, or another tokenizer than byte-level BPE.
        MixturaError: if the package gguf is not installed.
    """
    reader = _reader(Path(path))
    architecture = _value(reader, "general.architecture")
    if architecture != "llama" or _value(reader, "tokenizer.ggml.model") != "gpt2":
        raise NotExpressibleError(f"{str(path)!r} holds {architecture!r}; only Llama with byte-level BPE is read")
    return _model(reader, dtype), _tokenizer(reader)


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MixturaError('reading GGUF needs the package gguf: pip install "mixtura[gguf]"') from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            reader = GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise FileFormatError(f"{str(path)!r} is no whole GGUF file: {error}") from None
    return reader


def _value(reader: Any, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _model(reader: Any, dtype: torch.dtype) -> Any:
    from transformers import LlamaForCausalLM

    state = {}
    heads, kv_heads = (_value(reader, f"llama.attention.head_count{part}") for part in ("", "_kv"))
    for tensor in reader.tensors:
        weight = _dequantized(tensor).to(dtype)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = _rotary_halves(weight, heads if ".attn_q." in tensor.name else kv_heads)
        state[_name(tensor.name)] = weight
    config = _config(reader, tied="lm_head.weight" not in state)
    config.dtype = dtype
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise FileFormatError(f"the tensors do not make a Llama: {' '.join(str(error).split())[:200]}") from None
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no file
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    return model.eval()


def _config(reader: Any, *, tied: bool) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(_value(reader, "tokenizer.ggml.tokens")),
        hidden_size=_value(reader, "llama.embedding_length"),
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=_value(reader, "llama.attention.head_count"),
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_value(reader, "llama.context_length"),
        rms_norm_eps=_value(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _value(reader, "llama.rope.freq_base", 10_000.0)},
        bos_token_id=_value(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_value(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_value(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=tied,
    )


def _name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _INSIDE:
        raise NotExpressibleError(f"tensor {name!r} is none of a Llama's")
    return f"model.layers.{parts[1]}.{_INSIDE[parts[2]]}.{parts[3]}"


def _dequantized(tensor: Any) -> torch.Tensor:
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.reshape(tuple(reversed(tensor.shape)))))


def _rotary_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of rows: the pairs that rotate together are neighbors there, and R / 2 apart here."""
    R = len(weight) // heads
    return weight.view(heads, R // 2, 2, -1).transpose(1, 2).reshape(weight.shape).contiguous()


def _tokenizer(reader: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _value(reader, "tokenizer.ggml.merges")]
    fast = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if _value(reader, "tokenizer.ggml.pre") == "smollm" else []
    fast.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    types = _value(reader, "tokenizer.ggml.token_type", [])
    special = [token for token, kind in zip(tokens, types, strict=False) if kind == _SPECIAL]
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: _value(reader, f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        chat_template=_value(reader, "tokenizer.chat_template"),
        model_max_length=_value(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    )
