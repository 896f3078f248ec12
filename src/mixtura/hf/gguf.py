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
_ROTATED = {"attn_q": "head_count", "attn_k": "head_count_kv"}
_SPECIAL, _OWN = 3, 4  # token types "control" and "user defined": found in text before it is cut
_SPLITS_DIGITS = {"smollm": True, "gpt-2": False}  # by name of the rule that cuts text before byte pairs are merged
_MISSING = object()


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Read model and tokenizer.

    Args:
        path: of the file.
        dtype: of the weights.

    Raises:
        FileFormatError: if it is no GGUF file, cut off, or lacks something.
        NotExpressibleError: if it holds another architecture than Llama with plain rotary positions, or another
            tokenizer than byte-level BPE as SmolLM and GPT-2 cut their text.
        MixturaError: if the package gguf is not installed.

    The tokenizer follows the file's own rule ("smollm" cuts before and after each digit). transformers' reader ignores
    it, and so gives other tokens for a digit after two spaces or a newline.
    """
    reader = _reader(Path(path))
    try:
        _check(reader, path)
        return _model(reader, path, dtype), _tokenizer(reader)
    except MixturaError:
        raise
    except Exception as error:  # fields that contradict each other break numpy, torch, tokenizers or transformers
        reason = str(error).strip().partition("\n")[0]
        raise FileFormatError(f"GGUF file {str(path)!r} is damaged: {type(error).__name__} {reason}") from error


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MixturaError('reading GGUF needs the package gguf: pip install "mixtura[gguf]"') from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # sizes that overflow, in a damaged file
            return GGUFReader(path)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise FileFormatError(f"{str(path)!r} is no whole GGUF file: {error}") from None


def _value(reader: Any, key: str, default: Any = _MISSING) -> Any:
    """Content of a field.

    Raises:
        FileFormatError: if it is not there and has no default.
    """
    field = reader.get_field(key)
    if field is None and default is _MISSING:
        raise FileFormatError(f"the GGUF file has no field {key!r}")
    return default if field is None else field.contents()


def _check(reader: Any, path: str | Path) -> None:
    """Refuse what would be read into a model that computes something else than the file says."""
    accepted = {
        "general.architecture": ("llama",),
        "llama.rope.scaling.type": (None, "none"),
        "tokenizer.ggml.model": ("gpt2",),
        "tokenizer.ggml.pre": tuple(_SPLITS_DIGITS),
        "tokenizer.ggml.add_bos_token": (None, False),
    }
    for key, values in accepted.items():
        seen = _value(reader, key, None) if None in values else _value(reader, key)
        if seen not in values:
            raise NotExpressibleError(f"{str(path)!r} has {key} {seen!r}; read is {', '.join(map(repr, values))}")


def _model(reader: Any, path: str | Path, dtype: torch.dtype) -> Any:
    from transformers import LlamaForCausalLM

    state = {_name(tensor.name): _weight(tensor, reader).to(dtype) for tensor in reader.tensors}
    config = _config(reader, tied="lm_head.weight" not in state)
    layers = {name.split(".")[2] for name in state if name.startswith("model.layers.")}
    if len(layers) != config.num_hidden_layers:  # a damaged number could ask for millions
        raise FileFormatError(f"{str(path)!r} says {config.num_hidden_layers} layers and has {len(layers)}")
    config.dtype = dtype
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split(":", 1)[-1].split())
        raise FileFormatError(f"the tensors of {str(path)!r} do not make a Llama: {reason[:200]}") from None
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
        head_dim=_value(reader, "llama.attention.key_length", _value(reader, "llama.rope.dimension_count", None)),
        max_position_embeddings=_value(reader, "llama.context_length"),
        rms_norm_eps=_value(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _value(reader, "llama.rope.freq_base", 10_000.0)},
        bos_token_id=_value(reader, "tokenizer.ggml.bos_token_id", None),
        eos_token_id=_value(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_value(reader, "tokenizer.ggml.padding_token_id", None),
        tie_word_embeddings=tied,
    )


def _name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _INSIDE:
        raise NotExpressibleError(f"tensor {name!r} is none of a Llama's")
    return f"model.layers.{parts[1]}.{_INSIDE[parts[2]]}.{parts[3]}"


def _weight(tensor: Any, reader: Any) -> torch.Tensor:
    """A tensor in float32 and in transformers' order of rows."""
    from gguf.quants import dequantize

    try:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    except NotImplementedError:
        raise NotExpressibleError(f"tensor {tensor.name!r} is of type {tensor.tensor_type.name}, not read") from None
    weight = torch.from_numpy(np.ascontiguousarray(values.reshape(tuple(reversed(tensor.shape)))))
    rotated = _ROTATED.get(tensor.name.split(".")[-2])
    return weight if rotated is None else _rotary_halves(weight, _value(reader, f"llama.attention.{rotated}"))


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
    rules: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if _SPLITS_DIGITS[_value(reader, "tokenizer.ggml.pre")]:
        rules.insert(0, pre_tokenizers.Digits(individual_digits=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(rules)
    fast.decoder = decoders.ByteLevel()
    types = _value(reader, "tokenizer.ggml.token_type", [])
    whole = [(token, kind == _SPECIAL) for token, kind in zip(tokens, types, strict=False) if kind in (_SPECIAL, _OWN)]
    fast.add_tokens([AddedToken(token, normalized=False, special=special) for token, special in whole])
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: _value(reader, f"tokenizer.ggml.{theirs}_token_id", None) for ours, theirs in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        chat_template=_value(reader, "tokenizer.chat_template", None),
        model_max_length=_value(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    )
