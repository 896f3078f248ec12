"""``export``: a model of the family as a stock one, for programs that have never heard of mixtura.

Which stock family can hold a model is the table of ``mixtura.hf.capabilities``: a Llama, Mistral or Qwen2 all of whose
layers are plain mixtures is a mixtral, or with some dense layers a qwen2_moe, a Qwen3 a qwen3_moe. The shared expert of
qwen2_moe counts with sigmoid(0) = 1/2 and its output is doubled; where there is none it has width 1 and weights 0.
What no family can hold (null experts, biases, other selections, uneven sizes) is named.

Logits are compared in float32, whatever the model's type is. Stock routers compute their logits in the model's own
type, ours in float32: in half precision near ties fall differently, and some tokens go to other experts than here. The
receipt says how far that goes, and a warning if it is more than rounding.
"""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixtura.core.errors import MixturaError, MixturaWarning, NotExpressibleError
from mixtura.hf.capabilities import TARGETS, Target, biases, lacks, shape, windows
from mixtura.hf.modeling import mixtures
from mixtura.nn.mixture import Mixture

TOLERANCE = 1e-6  # of logits in float32, relative to the largest
ROUNDINGS = 16  # of logits in half precision, relative to the largest, in units of the type's precision

_CARRIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout"),
    "clip_qkv",
)


def check_export(model: Any) -> dict[str, str]:
    """For every stock family, the first capability that it lacks for this model; "" if it lacks none."""
    layers = mixtures(model)
    return {target.family: lacks(target, model.config, layers) for target in TARGETS}


def export(model: Any, out: str | Path, *, tokenizer: Any = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the model as a stock family, after its logits were compared.

    Args:
        model: of the family mixtura; it stays as it is.
        out: new or empty folder.
        tokenizer: saved beside it if given.
        overwrite: whether a folder that is there may be replaced.

    Returns:
        The receipt: family, dtype, max_logit_difference (in float32), tokens_checked, versions; for a model in half
        precision also max_logit_difference_in_dtype.

    Raises:
        NotExpressibleError: if no stock family can hold the model, with what each lacks.
        MixturaError: if logits differ.
        OptionError: if ``out`` exists and overwrite is False.
    """
    from mixtura.hf.save import save_model

    target = _choose(model)
    receipt = {"family": target.family, "dtype": str(model.dtype).removeprefix("torch.")}
    receipt |= _compared(target, model)
    receipt["versions"] = {name: importlib.metadata.version(name) for name in ("mixtura", "transformers", "torch")}
    stock = _build(target, model)
    save_model(stock, Path(out), tokenizer=tokenizer, receipts={"export": receipt}, overwrite=overwrite)
    return receipt


def _choose(model: Any) -> Target:
    lacking = check_export(model)
    for target in TARGETS:
        if not lacking[target.family]:
            return target
    reasons = "; ".join(f"{family}: {reason}" for family, reason in lacking.items())
    raise NotExpressibleError(f"no stock family can hold this model ({reasons})")


def _build(target: Target, model: Any) -> Any:
    """The stock model; it shares every tensor that it can with ``model``."""
    made = _config(target, model)
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(made)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items() if ".mixture." not in name}
    for number, mixture in mixtures(model).items():
        state |= _mixture_state(f"model.layers.{number}.mlp.", mixture, target.shared)
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    _renew_rotary(stock)
    stock.generation_config = model.generation_config
    return stock.to(model.device).eval()


def _renew_rotary(model: Any) -> None:
    """Make the frequencies anew, as every loading does: they are in no state dict, and ``model.to`` rounds them."""
    with torch.device("cpu"):
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def _config(target: Target, model: Any) -> Any:
    config, layers = model.config, mixtures(model)
    experts, width, spec, shared = shape(next(iter(layers.values())))
    fields = {name: getattr(config, name) for name in _CARRIED if hasattr(config, name)}
    fields |= dict(zip(target.names, (experts, width), strict=True))
    fields |= {"num_experts_per_tok": spec.k, "norm_topk_prob": spec.renormalize is not None}
    if target.dense_layers:
        dense = [i for i in range(config.num_hidden_layers) if str(i) not in layers]
        fields |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    if target.shared:
        fields["shared_expert_intermediate_size"] = max(shared, 1)
    fields |= {"qkv_bias": biases(config) == "qkv", "attention_bias": biases(config) == "qkvo", **_windows(config)}
    known = {"head_dim", *target.names, *CONFIG_MAPPING[target.family]().to_dict()}
    made = CONFIG_MAPPING[target.family](**{k: v for k, v in fields.items() if k in known}, dtype=config.dtype)
    made._attn_implementation = config._attn_implementation
    return made


def _windows(config: Any) -> dict[str, Any]:
    """How stock configurations say which layers have a sliding window."""
    found = windows(config)
    if not any(found):
        return {"use_sliding_window": False, "sliding_window": None}
    types = ["sliding_attention" if window else "full_attention" for window in found]
    return {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": types}


def _mixture_state(prefix: str, mixture: Mixture, has_shared: bool) -> dict[str, torch.Tensor]:
    router, experts = mixture.router.gate.weight, mixture.experts  # type: ignore[union-attr]
    state = {"gate.weight": router}
    state |= {f"experts.{part}": getattr(experts, part) for part in ("gate_up_proj", "down_proj")}
    if has_shared:
        state |= _shared_state(mixture, router)  # type: ignore[arg-type]
    return {prefix + name: tensor.detach() for name, tensor in state.items()}  # type: ignore[union-attr]


def _shared_state(mixture: Mixture, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """The family multiplies its shared expert by sigmoid(gate x) = sigmoid(0) = 1/2."""
    D = like.shape[1]
    state = {"shared_expert_gate.weight": like.new_zeros(1, D)}
    if mixture.shared is None:
        shapes = {"gate_proj": (1, D), "up_proj": (1, D), "down_proj": (D, 1)}
        return state | {f"shared_expert.{part}.weight": like.new_zeros(size) for part, size in shapes.items()}
    for part, factor in {"gate_proj": 1, "up_proj": 1, "down_proj": 2}.items():
        state[f"shared_expert.{part}.weight"] = getattr(mixture.shared, part).weight * factor
    return state


def _compared(target: Target, model: Any) -> dict[str, Any]:
    """Compare in float32 at least; in the model's own type the difference is only told."""
    exact = model.dtype in (torch.float32, torch.float64)
    wide = model if exact else _widened(model)
    difference, scale = _difference(wide, _build(target, wide))
    if not difference <= TOLERANCE * max(1.0, scale):
        raise MixturaError(f"the exported model's logits differ by {difference:.2e}; nothing was written")
    receipt = {"max_logit_difference": difference, "tokens_checked": _tokens(model).numel()}
    if not exact:
        receipt["max_logit_difference_in_dtype"] = _told(model, *_difference(model, _build(target, model)))
    return receipt


def _told(model: Any, difference: float, scale: float) -> float:
    """The difference, with a warning if it is more than rounding."""
    if not difference <= ROUNDINGS * torch.finfo(model.dtype).eps * max(1.0, scale):
        warnings.warn(
            f"stock routers compute their logits in {str(model.dtype).removeprefix('torch.')}, ours in float32: some "
            f"tokens go to other experts than here, logits differ by up to {difference:.2g}; export the model in "
            "float32 for equal ones",
            MixturaWarning,
            stacklevel=4,
        )
    return difference


def _widened(model: Any) -> Any:
    wide = copy.deepcopy(model).float()
    _renew_rotary(wide)
    return wide.to(model.device)


@torch.no_grad()
def _difference(model: Any, stock: Any) -> tuple[float, float]:
    """Largest difference of logits, and the largest logit."""
    training = model.training
    ours = model.eval()(_tokens(model), use_cache=False).logits.float()
    model.train(training)
    theirs = stock(_tokens(model), use_cache=False).logits.float()
    return float((theirs - ours).abs().max()), float(ours.abs().max())


def _tokens(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (2, 64), generator=generator).to(model.device)
