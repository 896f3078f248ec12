"""How the native families of transformers choose experts, as data: a ``SelectionSpec`` for a configuration.

A selection bias (``e_score_correction_bias``, ``expert_bias`` ...) is a weight, not configuration: give it to
``select``. Noise on a router's input in training (Mixtral's ``router_jitter_noise``) is no part of a selection either,
and a scale that a family applies outside of its router stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mixtura.core.errors import NotExpressibleError, unknown_name
from mixtura.core.selection import SelectionSpec


def selection_spec(config: Any) -> SelectionSpec:
    """How the routers of a native family choose and weigh experts.

    Args:
        config: of a model, or of the text part of one.

    Returns:
        The spec with which ``select`` gives the weights and indices of the family's own router.

    Raises:
        NotExpressibleError: if the family, or this configuration of it, does something that no spec says.
        UnknownNameError: if the model_type is of no known mixture, with the nearest one.
    """
    if config.model_type not in _SPECS and config.model_type not in _OUTSIDE:
        config = config.get_text_config()
    if config.model_type in _OUTSIDE:
        raise NotExpressibleError(f"{config.model_type}: {_OUTSIDE[config.model_type]}")
    if config.model_type not in _SPECS:
        raise unknown_name("mixture-of-experts model_type", config.model_type, [*_SPECS, *_OUTSIDE])
    return _SPECS[config.model_type](config)


def known_families() -> list[str]:
    """Model types that ``selection_spec`` can express."""
    return sorted(_SPECS)


def _softmax(config: Any) -> SelectionSpec:
    return SelectionSpec(k=config.num_experts_per_tok)


def _softmax_divided(config: Any) -> SelectionSpec:
    return SelectionSpec(k=config.num_experts_per_tok, renormalize=1)


def _softmax_divided_if_asked(config: Any) -> SelectionSpec:
    return SelectionSpec(k=config.num_experts_per_tok, renormalize=_if_asked(config))


def _softmax_of_chosen(config: Any) -> SelectionSpec:
    return SelectionSpec(k=config.num_experts_per_tok, order="topk-score")


def _sigmoid_divided_if_asked(config: Any) -> SelectionSpec:
    return SelectionSpec(k=config.num_experts_per_tok, score="sigmoid", renormalize=_if_asked(config))


def _sigmoid_divided(config: Any) -> SelectionSpec:
    return SelectionSpec(k=config.num_experts_per_tok, score="sigmoid", renormalize=1)


def _deepseek_v2(config: Any) -> SelectionSpec:
    k, scale = config.num_experts_per_tok, config.routed_scaling_factor
    if config.topk_method == "greedy":
        return SelectionSpec(k=k, scale=scale)
    if config.topk_method != "group_limited_greedy":
        raise NotExpressibleError(f"{config.model_type}: topk_method {config.topk_method!r} is not known")
    return SelectionSpec(k=k, scale=scale, groups=config.n_group, groups_kept=config.topk_group, group_fill=0.0)


def _deepseek_v3(config: Any) -> SelectionSpec:
    return SelectionSpec(
        k=config.num_experts_per_tok,
        score="sigmoid",
        renormalize=_if_asked(config),
        eps=1e-20,
        scale=config.routed_scaling_factor,
        groups=config.n_group,
        groups_kept=config.topk_group,
        group_score="top2-sum",
    )


def _beam(config: Any) -> SelectionSpec:
    return SelectionSpec(
        k=config.num_experts_per_tok,
        score="sigmoid",
        renormalize=_if_asked(config),
        eps=1e-20,
        groups=config.n_group,
        groups_kept=config.topk_group,
        group_score="top2-sum",
    )


def _mistral4(config: Any) -> SelectionSpec:
    # they fill with 0, which excludes like -inf as long as enough experts are eligible: a softmax is above 0
    return SelectionSpec(
        k=config.num_experts_per_tok,
        renormalize=_if_asked(config) if config.model_type == "mistral4" else 1,
        eps=1e-20,
        scale=config.routed_scaling_factor,
        groups=config.n_group,
        groups_kept=config.topk_group,
        group_score="top2-sum",
    )


def _inkling2(config: Any) -> SelectionSpec:
    if config.scoring_func != "sigmoid":
        raise NotExpressibleError(f"{config.model_type}: scoring_func must be 'sigmoid', got {config.scoring_func!r}")
    k = config.num_experts_per_tok
    return SelectionSpec(k=k, score="sigmoid", renormalize=1, eps=1e-20, scale=config.route_scale)


def _ernie(config: Any) -> SelectionSpec:
    return SelectionSpec(k=config.num_experts_per_tok, renormalize=1, norm_min=config.moe_norm_min)


def _hunyuan(config: Any) -> SelectionSpec:
    ks = config.moe_topk
    ks = {ks} if isinstance(ks, int) else set(ks)
    if len(ks) > 1:
        raise NotExpressibleError(f"hunyuan_v1_moe: moe_topk differs by layer, {sorted(ks)}; one spec has one k")
    return SelectionSpec(k=ks.pop(), renormalize=1)


def _cohere2(config: Any) -> SelectionSpec:
    sigmoid = config.expert_selection_fn == "sigmoid"
    return SelectionSpec(
        k=config.num_experts_per_tok,
        score=config.expert_selection_fn,
        order="topk-score",
        renormalize=_if_asked(config) if sigmoid else None,
    )


def _lfm2(config: Any) -> SelectionSpec:
    return SelectionSpec(
        k=config.num_experts_per_tok,
        score="sigmoid",
        renormalize=_if_asked(config),
        eps=1e-6,
        scale=config.routed_scaling_factor,
    )


def _afmoe(config: Any) -> SelectionSpec:
    k = config.num_experts_per_tok
    return SelectionSpec(k=k, score="sigmoid", renormalize=1, eps=1e-20, scale=config.route_scale)


def _hy_v3(config: Any) -> SelectionSpec:
    k = config.num_experts_per_tok
    return SelectionSpec(k=k, score="sigmoid", renormalize=1, eps=1e-20, scale=config.router_scaling_factor)


def _longcat(config: Any) -> SelectionSpec:
    return SelectionSpec(k=config.moe_topk, scale=config.routed_scaling_factor)


def _aria(config: Any) -> SelectionSpec:
    return SelectionSpec(k=config.moe_topk, order="topk-score")


def _llama4(config: Any) -> SelectionSpec:
    return SelectionSpec(k=config.num_experts_per_tok, score="sigmoid", order="topk-score", weight_on="input")


def _dbrx(config: Any) -> SelectionSpec:
    ffn = config.ffn_config
    return SelectionSpec(k=ffn.moe_top_k, renormalize=ffn.moe_normalize_expert_weights)


def _privacy_filter(config: Any) -> SelectionSpec:
    k = config.num_experts_per_tok
    return SelectionSpec(k=k, order="topk-score", scale=1 / k)


def _if_asked(config: Any) -> float | None:
    return 1.0 if config.norm_topk_prob else None


def _table(
    rows: Iterable[tuple[Callable[[Any], SelectionSpec], str]],
) -> dict[str, Callable[[Any], SelectionSpec]]:
    return {model_type: spec for spec, model_types in rows for model_type in model_types.split()}


_SPECS = _table(
    (
        (_softmax, "jamba"),
        (_softmax_divided, "mixtral minimax qwen3_5_moe_text qwen3_vl_moe_text"),
        (_softmax_divided_if_asked, "qwen2_moe qwen3_moe qwen3_next qwen4_exp_text olmoe flex_olmo mellum"),
        (_softmax_of_chosen, "granitemoe granitemoeshared granitemoehybrid granitemoe_swa gpt_oss"),
        (_sigmoid_divided, "minimax_m2 minimax_m3_vl_text"),
        (_deepseek_v2, "deepseek_v2 deepseek_ocr2_text unlimited_ocr_text"),
        (
            _deepseek_v3,
            "deepseek_v3 deepseek_v32 glm4_moe glm4_moe_lite glm4v_moe_text glm_moe_dsa dots1 dots3_note_text",
        ),
        (_deepseek_v3, "exaone_moe nemotron_h bailing_hybrid kimi_linear axk1 solar_open mimo_v2_flash hy_v4"),
        (_deepseek_v3, "glm5_next_text"),
        (_beam, "beam"),
        (_mistral4, "mistral4 mistral_large4_text"),
        (_inkling2, "inkling2_text"),
        (_sigmoid_divided_if_asked, "flint"),
        (_ernie, "ernie4_5_moe ernie4_5_vl_moe_text"),
        (_hunyuan, "hunyuan_v1_moe"),
        (_cohere2, "cohere2_moe"),
        (_lfm2, "lfm2_moe"),
        (_afmoe, "afmoe"),
        (_hy_v3, "hy_v3"),
        (_longcat, "longcat_flash"),
        (_aria, "aria_text"),
        (_llama4, "llama4_text"),
        (_dbrx, "dbrx"),
        (_privacy_filter, "openai_privacy_filter"),
    )
)

_OUTSIDE = {
    "phimoe": "sparsemixer weighs each expert by a softmax over its own masked set of logits",
    "switch_transformers": "experts have a capacity, and tokens beyond it are dropped",
    "nllb-moe": "experts have a capacity, and a second expert can be drawn at random",
    "jetmoe": "its router sorts tokens by expert itself, and its experts are not decorated for other backends",
    "zaya": "logits come from a network with a state over depth, and the last class skips the layer",
    "deepseek_v4": "scores are the root of a softplus, and the first layers choose by a table of token ids",
    "inkling_text": "shared experts take part in the normalization",
    "doge": "experts are retrieved by product keys",
    "axk2": "experts of other groups are pushed back to 0 and yet weighed by their scores",
    "gemma4_text": "weights are multiplied by a learned scale of each expert",
    "diffusion_gemma_text": "weights are multiplied by a learned scale of each expert",
    "kolibri1": "the selection bias is added to logits, not to scores",
    "laguna": "logits are capped by a hyperbolic tangent before they are scored",
    "muse_spark_text": "logits are multiplied before they are scored",
}
