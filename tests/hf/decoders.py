"""Small decoders that plans know, and how tests generate with them."""

import torch
from transformers import DynamicCache

from mixtura.hf import convert
from mixtura.hf.accelerate import acceleration
from mixtura.nn import Experts, Mixture
from mixtura.nn.mixture import FeedForward
from mixtura.nn.routers.aux_loss_free_bias import AuxLossFreeRouter
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico, tokens
from pico_native import native

WIDE = {"hidden_size": 64, "head_dim": 16}
NATIVE = {
    "aria_text": {},
    "dots1": {"n_group": 1},
    "glm4_moe": {"n_group": 1, "partial_rotary_factor": 1.0},
    "granitemoe": {},
    "hy_v3": {},
    "minimax_m2": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
}
PICO = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "olmoe": {},
    "mixtral": {"sliding_window": None},
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWS = {  # less than prompts of 9 tokens
    "mistral": {"sliding_window": 5},
    "mixtral": {"sliding_window": 2},
    "qwen2": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 6, "use_sliding_window": True, "layer_types": MIXED},
    "ministral": {"sliding_window": 5, "layer_types": MIXED},
}


def own():
    """A Llama with mixtures of ours: plain, with a shared expert, with a bias of the selection."""
    torch.manual_seed(1)
    biased = AuxLossFreeRouter(64, 4, k=2)
    biased.selection_bias_E.copy_(torch.tensor([0.3, -0.3, 0.1, 0.0]))
    return convert(
        pico("llama", **WIDE),
        {
            0: Mixture(TopKRouter(64, 4, k=2), Experts(4, 64, 32)),
            1: Mixture(TopKRouter(64, 4, k=1, bias=True, renormalize=None), Experts(4, 64, 24), FeedForward(64, 48)),
            2: Mixture(biased, Experts(4, 64, 40, activation="gelu")),
        },
    ).eval()


MODELS = {
    **{name: lambda n=name, o=options: pico(n, **{**WIDE, **o}) for name, options in PICO.items()},
    **{f"native-{name}": lambda n=name, o=options: native(n, **{**WIDE, **o}) for name, options in NATIVE.items()},
    "own": own,
}
GRANITE = {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 6.0, "attention_multiplier": 0.2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 8,
    "partial_rotary_factor": 0.75,
}
FAMILIES = {
    "gemma": {},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 0.5},
    "gemma3_text": {"sliding_window": 5, "layer_types": MIXED, "query_pre_attn_scalar": 20},
    "phi3": {},
    "stablelm": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 5, "layer_types": MIXED},
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": GRANITE,
    "seed_oss": {},
    "arcee": {},
    "nemotron": {},
    "glm4": {},
    "ernie4_5": {},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"sliding_window": 5, "layer_types": MIXED},
}
NATIVE_FAMILIES = {
    "flex_olmo": {},
    "mellum": {"sliding_window": 5},
    "granitemoe": GRANITE,
}


def spread(model):
    """Weights so large that scores and logits are, too: norms, caps and rotations matter."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def gpt_oss(**options):
    """Sinks, windows in turn, experts that lie interleaved with biases and clamp."""
    model = native("gpt_oss", **{**WIDE, "sliding_window": 5, "swiglu_limit": 0.5, **options})
    return spread(model)


WINDOWED = {
    **{f"window-{name}": lambda n=name, o=options: pico(n, **{**WIDE, **o}) for name, options in WINDOWS.items()},
    "window-native-qwen2_moe": lambda: native("qwen2_moe", **WIDE, use_sliding_window=True, sliding_window=5),
}


def padded(rows=2):
    """Token ids with padding on the left, and their mask."""
    ids, mask = tokens(rows, 9), torch.ones(rows, 9, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generated(model, **options):
    return model.generate(
        **padded(), max_new_tokens=6, pad_token_id=0, eos_token_id=None, **{"do_sample": False, **options}
    )


@torch.no_grad()
def decoded(model, ids, mask, cache=None):
    """Logits of every token after the first two, one step each, (B, Q, V)."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(ids[:, :2], attention_mask=mask[:, :2], past_key_values=cache)
    found = []
    for t in range(2, ids.shape[1]):
        place = mask[:, : t + 1].sum(1, keepdim=True) - 1
        found.append(
            model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], position_ids=place, past_key_values=cache).logits
        )
    return torch.cat(found, 1)


def report(model):
    """What became of decode steps."""
    return {name: value for name, value in acceleration(model).items() if name not in ("operations", "large_pages")}


def left(rows, length, pads):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :pads] = 0
    return mask
