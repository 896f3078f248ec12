"""What stock families with mixtures can hold, as a table, and the first thing that one lacks for a model of ours.

A family is wanted whose attention (biases, norms of queries and keys, window), kinds of layers, selection and experts
are those of the model. In all of them experts are gated and have no biases, the gate is linear, and every mixture has
the same sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from mixtura.core.selection import SelectionSpec
from mixtura.nn.experts.activations import ACTIVATIONS
from mixtura.nn.experts.feed_forward import Experts
from mixtura.nn.mixture import Mixture
from mixtura.nn.routers.base import LinearGate

Biases = Literal["none", "qkv", "qkvo"]
Norms = Literal["none", "each head", "all heads"]
Windows = Literal["none", "all layers", "any layers"]


@dataclasses.dataclass(frozen=True)
class Target:
    """A stock family.

    Attributes:
        family: its model_type.
        biases: which biases of attention it can have.
        norms: over what queries and keys are normalized.
        windows: which layers can have a sliding window.
        dense_layers: whether some layers can be dense feed-forwards.
        shared: whether it has a shared expert.
        renormalize: what the weights of the chosen can be divided by.
        names: what its configuration calls the number of experts and their width.
    """

    family: str
    biases: tuple[Biases, ...]
    norms: Norms
    windows: Windows
    dense_layers: bool
    shared: bool
    renormalize: tuple[float | None, ...]
    names: tuple[str, str]


TARGETS = (
    Target(
        family="mixtral",
        biases=("none",),
        norms="none",
        windows="all layers",
        dense_layers=False,
        shared=False,
        renormalize=(1.0,),
        names=("num_local_experts", "intermediate_size"),
    ),
    Target(
        family="olmoe",
        biases=("none", "qkvo"),
        norms="all heads",
        windows="none",
        dense_layers=False,
        shared=False,
        renormalize=(None, 1.0),
        names=("num_experts", "intermediate_size"),
    ),
    Target(
        family="qwen2_moe",
        biases=("none", "qkv"),
        norms="none",
        windows="any layers",
        dense_layers=True,
        shared=True,
        renormalize=(None, 1.0),
        names=("num_experts", "moe_intermediate_size"),
    ),
    Target(
        family="qwen3_moe",
        biases=("none", "qkvo"),
        norms="each head",
        windows="all layers",
        dense_layers=True,
        shared=False,
        renormalize=(None, 1.0),
        names=("num_experts", "moe_intermediate_size"),
    ),
)

# Families whose attention, norms and rotary embedding are those of a target, and what they normalize queries over.
BASE_NORMS: Mapping[str, Norms] = {
    "llama": "none",
    "mistral": "none",
    "mixtral": "none",
    "qwen2": "none",
    "qwen3": "each head",
    "olmoe": "all heads",
}


def lacks(target: Target, config: Any, layers: Mapping[str, Mixture]) -> str:
    """The first capability that the family lacks for a model; "" if none.

    Args:
        target: the family.
        config: of a model of the family mixtura.
        layers: its mixtures, by the number of their decoder layer.
    """
    base = getattr(config, "base_model_type", config.model_type)
    if getattr(config, "mixtura", {}).get("routers"):
        return "routers of ours in native mixtures"
    if not layers:
        return "the model has no mixtures of ours"
    if base not in BASE_NORMS:
        return f"its attention is that of {', '.join(BASE_NORMS)}, not of {base}"
    if reason := _attention_lacks(target, config, base) or _layers_lack(target, config, layers):
        return reason
    for number, mixture in layers.items():
        if reason := _mixture_lacks(target, mixture, config.hidden_act):
            return f"layer {number}: {reason}"
    if len({shape(mixture) for mixture in layers.values()}) > 1:
        return "mixtures of different sizes or selections"
    return ""


def shape(mixture: Mixture) -> tuple[int, int, SelectionSpec, int]:
    """Number of experts, their width, the selection, and the width of the shared expert (0 if there is none)."""
    shared = 0 if mixture.shared is None else int(mixture.shared.config["width"])  # type: ignore[call-overload]
    return mixture.experts.num_experts, mixture.experts.width, mixture.router.spec, shared  # type: ignore[return-value]


def biases(config: Any) -> Biases:
    """Which biases the attention of a base has."""
    if config.base_model_type == "qwen2":
        return "qkv"
    return "qkvo" if getattr(config, "attention_bias", False) else "none"


def windows(config: Any) -> list[int | None]:
    """Sliding window of each layer."""
    window = getattr(config, "sliding_window", None)
    if config.base_model_type not in ("qwen2", "qwen3"):
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in config.layer_types]


def _attention_lacks(target: Target, config: Any, base: str) -> str:
    if BASE_NORMS[base] != target.norms:
        return f"norms of queries and keys: it has {target.norms}, {base} {BASE_NORMS[base]}"
    if biases(config) not in target.biases:
        return f"biases in attention: {biases(config)}"
    if target.windows == "none" and any(windows(config)):
        return "sliding-window attention"
    if target.windows == "all layers" and len(set(windows(config))) > 1:
        return "sliding-window attention in some of the layers"
    return ""


def _layers_lack(target: Target, config: Any, layers: Mapping[str, Mixture]) -> str:
    others = [i for i in range(config.num_hidden_layers) if str(i) not in layers]
    if others and not target.dense_layers:
        return f"layers that are no mixtures of ours: {others[0]}"
    if getattr(config, "mlp_bias", False):
        return "biases in the feed-forward"
    return ""


def _mixture_lacks(target: Target, mixture: Mixture, activation: str) -> str:
    experts, router = mixture.experts, mixture.router
    if type(experts) is not Experts:
        return "experts of several or other forms"
    if not experts.has_gate:
        return "experts without a gate"
    if experts.has_bias:
        return "experts with biases"
    name = experts.method_config["activation"]
    if ACTIVATIONS[name] is not ACTIVATIONS.get(activation):
        return f"activation {name} beside {activation}"
    if router.spec is None:
        return "a router that does not choose by its logits alone"
    # gates that differ from a linear one in training alone are subclasses of it
    if not isinstance(router.gate, LinearGate) or router.gate.bias is not None:
        return "another gate than a linear one without bias"
    if router.selection_bias_E is not None:
        return "a selection bias"
    return _selection_lacks(target, router.spec) or _shared_lacks(target, mixture, name)  # type: ignore[arg-type]


def _selection_lacks(target: Target, spec: SelectionSpec) -> str:
    """What differs from softmax over all experts, of which the best k count."""
    if spec.renormalize not in target.renormalize:
        return f"renormalize {spec.renormalize}, it has {' or '.join(map(str, target.renormalize))}"
    plain = SelectionSpec(k=spec.k, renormalize=spec.renormalize)
    for field in dataclasses.fields(spec):
        if getattr(spec, field.name) != getattr(plain, field.name):
            return f"selection with {field.name} {getattr(spec, field.name)}"
    return ""


def _shared_lacks(target: Target, mixture: Mixture, activation: str) -> str:
    if mixture.shared is None:
        return ""
    if not target.shared:
        return "a shared expert"
    options = mixture.shared.config
    if not options["gated"] or options["bias"] or options["activation"] != activation:
        return "a shared expert of another form than the experts"
    return ""
