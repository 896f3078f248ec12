"""Pico models of native mixtures of transformers: two layers, width 32, four experts, random weights; no download.

Run as a program it prints what is true of each family, as ``docs/native_families.json`` holds it.
"""

import functools
import json
import warnings

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
}
LATENT = {"num_key_value_heads": 4, "qk_head_dim": 16}
FULL_ATTENTION = {"layer_types": ["full_attention", "full_attention"]}
SPARSE_LAYERS = {"mlp_layer_types": ["sparse", "sparse"]}
FAMILIES = {  # decoders with experts that transformers decorates
    "afmoe": {"num_dense_layers": 0, "num_shared_experts": 1},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": LATENT,
    "axk2": {**LATENT, **SPARSE_LAYERS},
    "bailing_hybrid": {},
    "beam": {**FULL_ATTENTION, **SPARSE_LAYERS},
    "cohere2_moe": {},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": {"num_hash_layers": 1, "o_groups": 2, "o_lora_rank": 8, "hc_mult": 2},
    "dots1": {},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
    },
    "exaone_moe": SPARSE_LAYERS,
    "flex_olmo": {},
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {
        **FULL_ATTENTION,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 4,
    },
    "glm4_moe": {},
    "glm4_moe_lite": {**LATENT, **SPARSE_LAYERS},
    "glm_moe_dsa": {**LATENT, **SPARSE_LAYERS},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {
        "layer_types": ["attention", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
    },
    "granitemoeshared": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v3": SPARSE_LAYERS,
    "hy_v4": SPARSE_LAYERS,
    "inkling2_text": {},
    "inkling_text": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {"num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4},
    "kolibri1": {},
    "laguna": SPARSE_LAYERS,
    "lfm2_moe": {**FULL_ATTENTION, "num_dense_layers": 0},
    "mellum": {},
    "mimo_v2_flash": SPARSE_LAYERS,
    "minimax": {"block_size": 16, "layer_types": ["full_attention", "linear_attention"]},
    "minimax_m2": {},
    "minimax_m3_vl_text": {"dense_intermediate_size": 48, "rotary_dim": 8},
    "mixtral": {},
    "nemotron_h": {
        "layers_block_type": ["moe", "attention"],
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": None,
    },
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_5_moe_text": FULL_ATTENTION,
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen3_next": FULL_ATTENTION,
    "qwen4_exp_text": {
        "layer_types": ["indexed_attention", "indexed_attention"],
        "hc_count": 2,
        "hc_lowrank": 4,
        "ngram_vocab_size_base": 64,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
OUTSIDE = {  # decoders whose experts are not decorated
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "doge": {"is_moe": True},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 4},
    "llama4_text": {"interleave_moe_layer_step": 1, "intermediate_size_mlp": 40, "num_experts_per_tok": 1},
    "longcat_flash": {
        **LATENT,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 48,
        "num_layers": 2,
    },
}
OWN_ROUTERS = ("topk-softmax", "aux-loss-free-bias")


def native(model_type, **options):
    """A random native mixture in eval mode, biases of its selection too; equal for equal arguments."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **{**FAMILIES, **OUTSIDE}[model_type], **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.1)
    for name, tensor in model.state_dict().items():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            tensor.normal_(0, 0.1)
    return model


def reloaded(model, folder):
    """The model after it was saved and loaded, its tensors where new ones are: rounding depends on their alignment."""
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    return loaded


def tokens(rows=2, length=7):
    """Token ids (rows, length) without special ones."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, x, **options):
    """Without a cache."""
    return model(x, use_cache=False, **options).logits


def facts(model_type):
    """What a run says of a family: why no router of ours fits, and which one is its own.

    Returns:
        ``refused``, "" if routers can be installed, and ``same``: the key of a method that changes no bit of the logits
        when it is installed, "" if none of those tried does.
    """
    from mixtura.core.errors import NotExpressibleError
    from mixtura.hf.install import install

    try:
        install(native(model_type), "topk-softmax", start="random")
    except NotExpressibleError as error:
        return {"refused": str(error), "same": ""}
    return {"refused": "", "same": next(filter(functools.partial(changes_nothing, model_type), OWN_ROUTERS), "")}


def changes_nothing(model_type, key):
    """Whether the logits stay bit-equal when a method is installed with the family's own selection and weights."""
    from mixtura.core.errors import OptionError
    from mixtura.hf.install import install

    model = native(model_type)
    model.set_experts_implementation("mixtura")  # sums of the default one are rounded otherwise
    options = {"bias": True} if model_type == "gpt_oss" else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bias of the selection that is lost
            return install(model, key, **options).receipt["bit_equal"]
    except OptionError:  # a gate that is not linear, or a selection that the method has not
        return False


if __name__ == "__main__":
    print(json.dumps({model_type: facts(model_type) for model_type in sorted({**FAMILIES, **OUTSIDE})}, indent=2))
