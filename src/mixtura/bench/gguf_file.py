"""A model with random weights as a GGUF file in bfloat16, for llama.cpp: Qwen3-MoE and Llama, without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mixtura.core.errors import NotExpressibleError

_BFLOAT16_FILE = 32  # the file type in llama.cpp's list
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{short}": f"self_attn.{short}_proj" for short in "qkv"},
    "attn_output": "self_attn.o_proj",
}
_OF_FAMILY = {
    "qwen3_moe": {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate_inp": "mlp.gate"},
    "llama": {f"ffn_{short}": f"mlp.{short}_proj" for short in ("gate", "up", "down")},
}


def write_gguf(model: Any, path: Path) -> None:
    """Write a model.

    Args:
        model: of family qwen3_moe or llama, in bfloat16.
        path: of the file.

    Raises:
        NotExpressibleError: if it is of another family, or the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise NotExpressibleError("the package gguf is not installed: pip install 'mixtura[gguf]'") from None
    family = model.config.model_type
    if family not in _OF_FAMILY:
        raise NotExpressibleError(f"a model of family {family!r} is not written as GGUF here")
    writer = gguf.GGUFWriter(str(path), family.replace("_", ""))
    _write_settings(writer, model.config)
    for name, tensor in _tensors(model):
        if tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, tensor.float().numpy())
        else:
            bits = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_settings(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(_BFLOAT16_FILE)
    writer.add_tokenizer_model("no_vocab")
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    else:
        writer.add_rope_dimension_count(config.head_dim)


def _tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    state, config = model.state_dict(), model.config
    found = [(f"{short}.weight", state[f"{name}.weight"]) for short, name in _OUTSIDE.items()]
    for layer in range(config.num_hidden_layers):
        mine, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for short, name in (_ATTENTION | _OF_FAMILY[config.model_type]).items():
            tensor = state[f"{mine}.{name}.weight"]
            if config.model_type == "llama" and short in ("attn_q", "attn_k"):
                tensor = _rotated_in_pairs(tensor, config.head_dim)
            found.append((f"{theirs}.{short}.weight", tensor))
        if config.model_type == "qwen3_moe":
            gate, up = state[f"{mine}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
            down = state[f"{mine}.mlp.experts.down_proj"]
            found += [(f"{theirs}.ffn_{n}_exps.weight", t) for n, t in (("gate", gate), ("up", up), ("down", down))]
    return found


def _rotated_in_pairs(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of a head from halves (transformers) to neighbors (this format's Llama)."""
    return weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
