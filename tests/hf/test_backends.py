"""Our backends in native families: the logits and gradients of their own eager loop; theirs on our experts."""

import warnings

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface

from mixtura.core.errors import UnknownNameError
from mixtura.hf.backends import experts_backend
from mixtura.nn import Experts

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
}
LATENT = {"head_dim": 8, "num_key_value_heads": 4, "qk_head_dim": 16}
FULL_ATTENTION = {"layer_types": ["full_attention", "full_attention"]}
FAMILIES = {
    "afmoe": {"num_dense_layers": 0, "num_shared_experts": 1},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": LATENT,
    "cohere2_moe": {},
    "deepseek_v2": {**LATENT, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "dots1": {},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
    },
    "exaone_moe": {"mlp_layer_types": ["sparse", "sparse"]},
    "flex_olmo": {},
    "glm4_moe": {},
    "glm4_moe_lite": {**LATENT, "mlp_layer_types": ["sparse", "sparse"]},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {**FULL_ATTENTION, "num_dense_layers": 0},
    "minimax": {"block_size": 16, "layer_types": ["full_attention", "linear_attention"]},
    "minimax_m2": {},
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
    "solar_open": {},
}


def native(model_type):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **FAMILIES[model_type]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.1)
    return model


def run(model, backend, ids, probe):
    """Logits, and gradients by parameter."""
    model.set_experts_implementation(backend)
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    (logits * probe).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_native_families(model_type, generator, monkeypatch):
    calls = []
    ours = experts_backend("mixtura")
    monkeypatch.setitem(ExpertsInterface._global_mapping, "counted", lambda *a: calls.append(1) or ours(*a))
    model = native(model_type)
    ids = torch.randint(3, 64, (2, 7), generator=generator)
    probe = torch.randn(2, 7, 64, generator=generator)
    logits, gradients = run(model, "eager", ids, probe)
    our_logits, our_gradients = run(model, "counted", ids, probe)
    assert len(calls) == (1 if model_type == "nemotron_h" else 2)
    torch.testing.assert_close(our_logits, logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == our_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", ["mixtura", "mixtura_naive"])
def test_registered_by_name(backend, generator):
    model = native("olmoe")
    ids = torch.randint(3, 64, (2, 7), generator=generator)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(ids).logits
        model.set_experts_implementation(backend)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm", "mixtura", "mixtura_naive"])
@pytest.mark.parametrize(
    "layout", [{}, {"bias": True}, {"gated": False}, {"transposed": True}, {"interleaved": True}], ids=str
)
def test_every_backend_on_our_experts_with_empty_slots(backend, layout, generator):
    torch.manual_seed(0)
    experts = Experts(4, 16, 8, **layout)
    hidden_TD = torch.randn(9, 16, generator=generator)
    indices_TK = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(9)])
    indices_TK[3] = 4
    weights_TK = torch.rand(9, 2, generator=generator).masked_fill(indices_TK == 4, 0).requires_grad_()
    expected = experts_backend("mixtura_naive")(experts, hidden_TD, indices_TK, weights_TK)
    out_TD = experts_backend(backend)(experts, hidden_TD, indices_TK, weights_TK)
    torch.testing.assert_close(out_TD, expected, rtol=1e-5, atol=1e-7)
    assert not out_TD[3].any()
    (gradient_TK,) = torch.autograd.grad(out_TD.sum(), weights_TK)
    assert not gradient_TK[indices_TK == 4].any()


def test_unknown_name_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'grouped_mm'"):
        experts_backend("groupd_mm")


def test_a_backend_that_is_registered_later_is_found(monkeypatch, generator):
    monkeypatch.setitem(ExpertsInterface._global_mapping, "late", lambda experts, hidden_TD, *_: hidden_TD)
    experts = Experts(2, 4, 4)
    hidden_TD = torch.randn(3, 4, generator=generator)
    indices_TK = torch.zeros(3, 1, dtype=torch.int64)
    assert torch.equal(experts_backend("late")(experts, hidden_TD, indices_TK, torch.ones(3, 1)), hidden_TD)
