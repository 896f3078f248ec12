"""Every family's spec gives what the family's own router gives on random inputs, to the bit.

T tokens, D width, E experts, K slots a token.
"""

import importlib
import inspect

import pytest
import torch
from transformers import CONFIG_MAPPING

from mixtura.core import routing as r
from mixtura.core.errors import NotExpressibleError, UnknownNameError
from mixtura.core.routing import Routing
from mixtura.core.selection import select
from mixtura.hf.families import known_families, selection_spec

T, D, E, K = 64, 16, 8, 3
SIZES = {
    "hidden_size": D,
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "num_experts_per_tok": K,
    "num_experts_per_token": K,
    "moe_topk": K,
    "moe_k": K,
    "n_group": 4,
    "num_expert_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "moe_renormalize": True,
    "routed_scaling_factor": 2.5,
    "route_scale": 2.0,
    "router_scaling_factor": 1.5,
    "topk_method": "greedy",
    "zero_expert_num": 2,
}
ROUTERS = {
    "afmoe": ("afmoe", "AfmoeTokenChoiceRouter"),
    "aria_text": ("aria", "AriaTextTopKRouter"),
    "axk1": ("axk1", "AXK1TopkRouter"),
    "bailing_hybrid": ("bailing_hybrid", "BailingHybridTopkRouter"),
    "beam": ("beam", "BeamTopKRouter"),
    "cohere2_moe": ("cohere2_moe", "Cohere2MoeTopKRouter"),
    "deepseek_ocr2_text": ("deepseek_ocr2", "DeepseekOcr2TextTopkRouter"),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2TopkRouter"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3TopkRouter"),
    "deepseek_v32": ("deepseek_v32", "DeepseekV32TopkRouter"),
    "dots1": ("dots1", "Dots1TopkRouter"),
    "dots3_note_text": ("dots3_note", "Dots3NoteTextTopkRouter"),
    "ernie4_5_moe": ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter"),
    "ernie4_5_vl_moe_text": ("ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeTopKRouter"),
    "exaone_moe": ("exaone_moe", "ExaoneMoeTopkRouter"),
    "flex_olmo": ("flex_olmo", "FlexOlmoTopKRouter"),
    "flint": ("flint", "FlintTopKRouter"),
    "glm4_moe": ("glm4_moe", "Glm4MoeTopkRouter"),
    "glm4_moe_lite": ("glm4_moe_lite", "Glm4MoeLiteTopkRouter"),
    "glm4v_moe_text": ("glm4v_moe", "Glm4vMoeTextTopkRouter"),
    "glm5_next_text": ("glm5_next", "Glm5NextTextTopkRouter"),
    "glm_moe_dsa": ("glm_moe_dsa", "GlmMoeDsaTopkRouter"),
    "gpt_oss": ("gpt_oss", "GptOssTopKRouter"),
    "granitemoe": ("granitemoe", "GraniteMoeTopKRouter"),
    "granitemoe_swa": ("granitemoe_swa", "GraniteMoeSWATopKRouter"),
    "granitemoehybrid": ("granitemoehybrid", "GraniteMoeHybridTopKRouter"),
    "granitemoeshared": ("granitemoeshared", "GraniteMoeSharedTopKRouter"),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", "HunYuanMoEV1Gate"),
    "hy_v3": ("hy_v3", "HYV3TopKRouter"),
    "hy_v4": ("hy_v4", "HYV4TopkRouter"),
    "inkling2_text": ("inkling2", "Inkling2TopKRouter"),
    "jamba": ("jamba", "JambaTopKRouter"),
    "kimi_linear": ("kimi_linear", "KimiLinearTopkRouter"),
    "lfm2_moe": ("lfm2_moe", "Lfm2MoeTopKRouter"),
    "llama4_text": ("llama4", "Llama4Router"),
    "longcat_flash": ("longcat_flash", "LongcatFlashTopkRouter"),
    "mellum": ("mellum", "MellumTopKRouter"),
    "mimo_v2_flash": ("mimo_v2_flash", "MiMoV2FlashTopkRouter"),
    "minimax": ("minimax", "MiniMaxTopKRouter"),
    "minimax_m2": ("minimax_m2", "MiniMaxM2TopKRouter"),
    "minimax_m3_vl_text": ("minimax_m3_vl", "MiniMaxM3VLTopKRouter"),
    "mistral4": ("mistral4", "Mistral4TopkRouter"),
    "mistral_large4_text": ("mistral_large4", "MistralLarge4TextTopkRouter"),
    "mixtral": ("mixtral", "MixtralTopKRouter"),
    "nemotron_h": ("nemotron_h", "NemotronHTopkRouter"),
    "olmoe": ("olmoe", "OlmoeTopKRouter"),
    "openai_privacy_filter": ("openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter"),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeTopKRouter"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeTopKRouter"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeTopKRouter"),
    "qwen3_next": ("qwen3_next", "Qwen3NextTopKRouter"),
    "qwen3_vl_moe_text": ("qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter"),
    "qwen4_exp_text": ("qwen4_exp", "Qwen4ExpTextTopKRouter"),
    "solar_open": ("solar_open", "SolarOpenTopkRouter"),
    "unlimited_ocr_text": ("unlimited_ocr", "UnlimitedOcrTextTopkRouter"),
}
VARIANTS = [
    *((model_type, {}) for model_type in ROUTERS),
    ("deepseek_v2", {"topk_method": "group_limited_greedy"}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "topk_group": 1}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("qwen2_moe", {"norm_topk_prob": False}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid"}),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("lfm2_moe", {"use_expert_bias": False}),
    ("hunyuan_v1_moe", {"moe_topk": [K, K]}),
]
ROUNDING = {"llama4_text": 3e-8, "openai_privacy_filter": 3e-8}


def config_of(model_type, options=None):
    config = CONFIG_MAPPING[model_type]()
    for name, value in {**SIZES, **(options or {})}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def native_router(model_type, config):
    """The family's router with random weights, and its selection bias (E,) or None."""
    package, name = ROUTERS[model_type]
    cls = getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)
    router = cls(config, 0) if "layer_idx" in inspect.signature(cls).parameters else cls(config)
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data.normal_(0, 0.5)
    biases = [t.reshape(-1) for n, t in router.state_dict().items() if n.endswith("e_score_correction_bias")]
    return router.eval(), biases[0] if biases else None


def native_routing(model_type, config):
    """Logits, dense weights (T, E) of the family's router, and its selection bias."""
    router, bias_E = native_router(model_type, config)
    hidden_TD = torch.randn(T, D)
    if model_type == "llama4_text":
        dense_TE, logits_TE = router(hidden_TD)
        return logits_TE, dense_TE, None
    arguments = [hidden_TD[None] if model_type == "afmoe" else hidden_TD]
    if len(inspect.signature(router.forward).parameters) == 2:
        bias_E = torch.randn(E) * 0.2
        arguments.append(bias_E)
    if model_type == "lfm2_moe" and not config.use_expert_bias:
        bias_E = None
    logits_TE, weights_TK, indices_TK = router(*arguments)
    return logits_TE, r.dense(Routing(logits_TE, weights_TK, indices_TK)), bias_E


@pytest.mark.parametrize(("model_type", "options"), VARIANTS, ids=str)
def test_equals_the_family(model_type, options):
    torch.manual_seed(0)
    config = config_of(model_type, options)
    with torch.no_grad():
        logits_TE, theirs_TE, bias_E = native_routing(model_type, config)
        ours_TE = r.dense(select(logits_TE, selection_spec(config), bias_E))
    assert (ours_TE - theirs_TE).abs().max() <= ROUNDING.get(model_type, 0)
    assert (theirs_TE > 0).sum() >= T


@pytest.mark.parametrize(("p", "rounding"), [(1.0, 0), (2.0, 2e-7), (None, 0)])
def test_dbrx(p, rounding, generator):
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN

    config = CONFIG_MAPPING["dbrx"](
        ffn_config={"moe_top_k": K, "moe_num_experts": E, "moe_normalize_expert_weights": p}
    )
    ffn = DbrxFFN.__new__(DbrxFFN)
    torch.nn.Module.__init__(ffn)
    ffn.top_k, ffn.moe_normalize_expert_weights = K, p
    logits_TE = torch.randn(T, E, generator=generator)
    theirs = Routing(logits_TE, *ffn.route_tokens_to_experts(logits_TE))
    ours = select(logits_TE, selection_spec(config))
    assert (r.dense(ours) - r.dense(theirs)).abs().max() <= rounding


def test_every_known_family_is_compared():
    assert set(known_families()) == {*ROUTERS, "dbrx"}


@pytest.mark.parametrize(
    "model_type",
    ["phimoe", "switch_transformers", "jetmoe", "zaya", "nllb-moe", "deepseek_v4", "doge", "axk2", "laguna"],
)
def test_outside(model_type):
    with pytest.raises(NotExpressibleError, match=f"{model_type}: "):
        selection_spec(CONFIG_MAPPING[model_type]())


def test_a_composite_configuration_is_read_by_its_text_part():
    config = CONFIG_MAPPING["llama4"]()
    assert selection_spec(config) == selection_spec(config.text_config)


def test_unknown_model_type_names_the_nearest():
    config = CONFIG_MAPPING["llama"]()
    config.model_type = "mixtrall"
    with pytest.raises(UnknownNameError, match="did you mean 'mixtral'"):
        selection_spec(config)


def test_ragged_k_is_refused():
    with pytest.raises(NotExpressibleError, match="differs by layer"):
        selection_spec(config_of("hunyuan_v1_moe", {"moe_topk": [1, 2]}))
