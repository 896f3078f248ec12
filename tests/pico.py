"""Pico models: two to four layers, width 32, random weights, built in code; no download."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import mixtura.hf  # noqa: F401  registers the family and the backends

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi": {},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
}
SPARSE = {
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
}


def pico(model_type, **options):
    """A random model of a family, in eval mode; equal for equal arguments."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](
        **{**COMMON, **DENSE.get(model_type, {}), **SPARSE.get(model_type, {}), **options}
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(rows=2, length=9, seed=0):
    """Token ids (rows, length) without special ones."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
