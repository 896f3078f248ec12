"""``export``: a model of the family as a stock one, for programs that have never heard of mixtura.

Which stock family can hold a model is a table of capabilities. A Llama, Mistral or Qwen2 some of whose layers are plain
mixtures is a qwen2_moe, a Qwen3 a qwen3_moe; a shared expert w times sigmoid(0) = 1/2 is exact with its output
doubled. What no family can hold (null experts, biases, other selections, uneven numbers) is named.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixtura.core.errors import MixturaError, NotExpressibleError
from mixtura.core.selection import SelectionSpec
from mixtura.hf.modeling import mixtures
from mixtura.nn.experts.feed_forward import Experts
from mixtura.nn.mixture import Mixture
from mixtura.nn.routers.base import LinearGate

TOLERANCE = 1e-6  # of logits in float32, relative to the largest

_CARRIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A stock family.

    Attributes:
        family: its model_type.
        bases: families with its attention, norms and rotary embedding.
        shared: whether it has a shared expert.
        config: what its configuration has beyond the base's and the experts' sizes.
    """

    family: str
    bases: tuple[str, ...]
    shared: bool
    config: Callable[[Any], dict[str, Any]]


TARGETS = (
    Target(
        "qwen2_moe", ("llama", "mistral", "qwen2"), True, lambda base: {"qkv_bias": base.base_model_type == "qwen2"}
    ),
    Target("qwen3_moe", ("qwen3",), False, lambda base: {"attention_bias": base.attention_bias}),
)


def check_export(model: Any) -> dict[str, str]:
    """For every stock family, the first capability that it lacks for this model; "" if it lacks none."""
    return {target.family: _lacks(target, model) for target in TARGETS}


def export(model: Any, out: str | Path, *, tokenizer: Any = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the model as a stock family, after its logits were compared.

    Args:
        model: of the family mixtura; it stays as it is.
        out: new or empty folder.
        tokenizer: saved beside it if given.
        overwrite: whether a folder that is there may be replaced.

    Returns:
        The receipt: family, max_logit_difference, tokens_checked, versions.

    Raises:
        NotExpressibleError: if no stock family can hold the model, with what each lacks.
        MixturaError: if logits differ.
    """
    from mixtura.hf.save import save_model

    target = _choose(model)
    stock = _build(target, model)
    receipt = {
        "family": target.family,
        **_compare(model, stock),
        "versions": {name: importlib.metadata.version(name) for name in ("mixtura", "transformers", "torch")},
    }
    save_model(stock, Path(out), tokenizer=tokenizer, receipts={"export": receipt}, overwrite=overwrite)
    return receipt


def _choose(model: Any) -> Target:
    lacks = check_export(model)
    for target in TARGETS:
        if not lacks[target.family]:
            return target
    reasons = "; ".join(f"{family}: {reason}" for family, reason in lacks.items())
    raise NotExpressibleError(f"no stock family can hold this model ({reasons})")


def _lacks(target: Target, model: Any) -> str:
    """The first capability that the family lacks, "" if none."""
    config, layers = model.config, mixtures(model)
    base = getattr(config, "base_model_type", config.model_type)
    if not layers:
        return "the model has no mixtures"
    if base not in target.bases:
        return f"its attention is that of {', '.join(target.bases)}, not of {base}"
    if base == "llama" and (config.attention_bias or config.mlp_bias):
        return "biases in attention or feed-forward"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "sliding-window attention as the base has it"
    for number, mixture in layers.items():
        if reason := _mixture_lacks(target, mixture, config.hidden_act):
            return f"layer {number}: {reason}"
    if len({_shape(mixture) for mixture in layers.values()}) > 1:
        return "layers of different sizes or selections"
    return ""


def _mixture_lacks(target: Target, mixture: Mixture, activation: str) -> str:
    experts, router = mixture.experts, mixture.router
    if type(experts) is not Experts:
        return "experts of several forms"
    if not experts.has_gate or experts.has_bias:
        return "experts without a gate, or with biases"
    if experts.method_config["activation"] != activation:
        return f"activation {experts.method_config['activation']} beside {activation}"
    if type(router.gate) is not LinearGate or router.gate.bias is not None or router.selection_bias_E is not None:
        return "another gate than a linear one without bias"
    if router.spec not in (_spec(router.spec.k, None), _spec(router.spec.k, 1.0)):
        return "another selection than softmax over all, top-k, divided by their sum or not"
    if mixture.shared is not None and not target.shared:
        return "a shared expert"
    return ""


def _spec(k: int, renormalize: float | None) -> SelectionSpec:
    return SelectionSpec(k=k, renormalize=renormalize)


def _shape(mixture: Mixture) -> tuple[Any, ...]:
    shared = 0 if mixture.shared is None else mixture.shared.config["width"]
    return mixture.experts.num_experts, mixture.experts.width, mixture.router.spec, shared  # type: ignore[union-attr]


def _build(target: Target, model: Any) -> Any:
    """The stock model; it shares every tensor that it can with ``model``."""
    config, layers = model.config, mixtures(model)
    experts, width, spec, shared = _shape(next(iter(layers.values())))
    carried = {name: getattr(config, name) for name in _CARRIED if hasattr(config, name)}
    sizes = {
        "num_experts": experts,
        "num_experts_per_tok": spec.k,
        "norm_topk_prob": spec.renormalize is not None,
        "moe_intermediate_size": width,
        "mlp_only_layers": [i for i in range(config.num_hidden_layers) if str(i) not in layers],
        "decoder_sparse_step": 1,
        **({"shared_expert_intermediate_size": max(shared, 1)} if target.shared else {}),
    }
    made = CONFIG_MAPPING[target.family](**carried, **sizes, **target.config(config), dtype=config.dtype)
    made._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(made)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if ".mixture." not in name}
    for number, mixture in layers.items():
        state |= _mixture_state(f"model.layers.{number}.mlp.", mixture, target.shared)
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    stock.model.rotary_emb = type(stock.model.rotary_emb)(made).to(model.device)  # its buffers are in no state dict
    stock.generation_config = model.generation_config
    return stock.eval()


def _mixture_state(prefix: str, mixture: Mixture, has_shared: bool) -> dict[str, torch.Tensor]:
    router, experts = mixture.router.gate.weight, mixture.experts  # type: ignore[union-attr]
    state = {"gate.weight": router}
    state |= {f"experts.{part}": getattr(experts, part) for part in ("gate_up_proj", "down_proj")}
    if has_shared:
        parts = ("gate_proj", "up_proj", "down_proj")
        if mixture.shared is None:
            empty_FD = router.new_zeros(1, experts.dim)  # type: ignore[operator]
            weights = [empty_FD, empty_FD, empty_FD.T]
        else:
            weights = [getattr(mixture.shared, part).weight for part in parts]
            weights[2] = weights[2] * 2  # the family multiplies by sigmoid(0)
        state |= {f"shared_expert.{part}.weight": w for part, w in zip(parts, weights, strict=True)}
        state["shared_expert_gate.weight"] = router.new_zeros(1, experts.dim)  # type: ignore[operator]
    return {prefix + name: tensor.detach().clone() for name, tensor in state.items()}  # type: ignore[union-attr]


@torch.no_grad()
def _compare(model: Any, stock: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tokens_BQ = torch.randint(0, model.config.vocab_size, (2, 64), generator=generator).to(model.device)
    training = model.training
    ours = model.eval()(tokens_BQ, use_cache=False).logits.float()
    model.train(training)
    difference = float((stock(tokens_BQ, use_cache=False).logits.float() - ours).abs().max())
    exact = model.dtype in (torch.float32, torch.float64)
    if not difference <= (TOLERANCE if exact else 2e-2) * max(1.0, float(ours.abs().max())):
        raise MixturaError(f"the exported model's logits differ by {difference:.2e}; nothing was written")
    return {"max_logit_difference": difference, "tokens_checked": tokens_BQ.numel()}
