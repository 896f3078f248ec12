"""The family ``mixtura``: any decoder of transformers, some of whose layers are our mixtures.

For every base family a configuration and a model class are made once, as subclasses of the base's own. The
configuration is flat: the base's fields, ``base_model_type``, and ``mixtura``, which holds a version and, by the number
of the decoder layer, ``Mixture.config``. After ``import mixtura.hf`` the Auto classes load it like any other; on disk
every expert has tensors of its own.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixtura.core.errors import FileFormatError, MixturaWarning, NotExpressibleError, OptionError, unknown_name
from mixtura.hf.backends import experts_backend
from mixtura.hf.forward import attach_state, with_state
from mixtura.hf.sites import feed_forward_sites
from mixtura.nn.experts.feed_forward import Experts
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.mixture import Mixture

VERSION = 1
DEFAULT_BACKEND = "mixtura"
MAX_FORMS = 8  # feed-forward forms of one ExpertGroup that have names on disk


class MixturaConfig(PreTrainedConfig):
    """Configuration of the family; ``from_dict`` gives the subclass of the base family."""

    model_type = "mixtura"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration of the right base family.

        Raises:
            FileFormatError: if the dictionary names no base family, or was written by a newer version.
            UnknownNameError: if this transformers does not know the base family.
        """
        config_class = family(_check_dict(config_dict))[0] if cls is MixturaConfig else cls
        return super(MixturaConfig, config_class).from_dict(config_dict, **kwargs)


def _check_dict(config: dict[str, Any]) -> str:
    ours = config.get("mixtura")
    if not isinstance(ours, dict) or "layers" not in ours or "base_model_type" not in config:
        raise FileFormatError("a configuration of model_type 'mixtura' needs 'base_model_type' and 'mixtura.layers'")
    if ours.get("version", VERSION) > VERSION:
        raise FileFormatError(
            f"this model was written as version {ours['version']} of the family, known are versions up to {VERSION}; "
            "upgrade mixtura"
        )
    return str(config["base_model_type"])


class MixturaModel:
    """What the model classes of the family add to those of their base.

    Raises:
        OptionError: on an unknown experts implementation, reentrant checkpointing, or a layer that the base has not.
    """

    _building = True
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        wanted = _known(config._experts_implementation or DEFAULT_BACKEND)
        super().__init__(config, *args, **kwargs)
        self._building = False
        config._experts_implementation_internal = wanted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MixturaWarning)  # of choices that were made before the model was saved
            layers = {int(i): Mixture.from_config(spec) for i, spec in config.mixtura["layers"].items()}
        _attach(self, layers)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The backend by that name, "mixtura" by default; the dense base sees "eager" while it is built."""
        return "eager" if self._building else _known(requested_experts or DEFAULT_BACKEND)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        if not enable:
            super()._set_gradient_checkpointing(enable=False, **kwargs)  # type: ignore[misc]
            return
        function = with_state(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers', and every tensor must be there.

        Raises:
            FileFormatError: if a tensor is missing or of another shape, or a mixture's is superfluous; nothing is left
                uninitialized.
        """
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        _refuse("missing", info["missing_keys"])
        _refuse("unexpected", [key for key in info["unexpected_keys"] if ".mixture." in key])
        _refuse("mismatched", [] if ignore_mismatched_sizes else info["mismatched_keys"])
        return (model, info) if output_loading_info else model


def _refuse(what: str, keys: Iterable[Any]) -> None:
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise FileFormatError(f"the checkpoint has {what} tensors: {', '.join(names[:3])}{more}")


class _ConfiguredBackend:
    """Experts backend that the model's configuration names at the time of the call."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, *args: Any) -> torch.Tensor:
        return experts_backend(self.config._experts_implementation)(*args)


def _known(backend: str) -> str:
    experts_backend(backend)
    return backend


@functools.cache
def family(base_model_type: str) -> tuple[type, type]:
    """Configuration class and model class of the family over one base family, made and registered once.

    Raises:
        UnknownNameError: if transformers does not know the base.
        NotExpressibleError: if the base is no decoder with a language-model head.
    """
    if base_model_type not in CONFIG_MAPPING:
        raise unknown_name("model_type", base_model_type, CONFIG_MAPPING.keys())
    base_config = CONFIG_MAPPING[base_model_type]
    if base_config not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotExpressibleError(f"{base_model_type} has no causal language model in transformers")
    fields = {"model_type": "mixtura", "__module__": __name__, "base_model_type": base_model_type}
    config_class = _export(type(f"Mixtura{base_config.__name__}", (MixturaConfig, base_config), fields))
    causal = _model_class(MODEL_FOR_CAUSAL_LM_MAPPING[base_config], config_class, base_model_type)
    AutoModelForCausalLM.register(config_class, causal)
    if base_config in MODEL_MAPPING:
        AutoModel.register(config_class, _model_class(MODEL_MAPPING[base_config], config_class, base_model_type))
    return config_class, causal


def _model_class(base: type, config_class: type, base_model_type: str) -> type:
    name = f"Mixtura{base.__name__}"
    theirs = (
        get_checkpoint_conversion_mapping(base.__name__) or get_checkpoint_conversion_mapping(base_model_type) or []
    )
    register_checkpoint_conversion_mapping(name, _conversions() + theirs, overwrite=True)
    members = {"config_class": config_class, "__module__": __name__, "__annotations__": {"config": config_class}}
    return _export(type(name, (MixturaModel, base), members))


def _export(cls: type) -> type:
    """Give a made class its place in this module, where pickle and deepcopy look for it."""
    setattr(sys.modules[__name__], cls.__name__, cls)
    return cls


def _conversions() -> list[WeightConverter]:
    """From one tensor an expert on disk to stacks in memory, and back."""
    # the more special places first: a "*" stands for anything, and the first pattern that fits is taken
    places = [*(f"mixture.experts.forms.{i}" for i in range(MAX_FORMS)), "mixture.experts"]
    return [converter for place in places for converter in _conversions_at(place)]


def _conversions_at(place: str) -> list[WeightConverter]:
    converters = []
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        halves = [f"{place}.*.gate_proj.{kind}", f"{place}.*.up_proj.{kind}"]
        converters += [
            WeightConverter(halves, f"{place}.gate_up_proj{suffix}", [MergeModulelist(0), Concatenate(1)]),
            WeightConverter(f"{place}.*.fc1.{kind}", f"{place}.up_proj{suffix}", [MergeModulelist(0)]),
            WeightConverter(f"{place}.*.down_proj.{kind}", f"{place}.down_proj{suffix}", [MergeModulelist(0)]),
        ]
    return converters


def convert(model: PreTrainedModel, layers: dict[int, Mixture]) -> Any:
    """The model as one of the family, with mixtures in some decoder layers.

    All other weights are shared, not copied: ``model`` must not be used afterwards.

    Args:
        model: causal language model of transformers, or of the family already (its mixtures stay).
        layers: mixture by number of the decoder layer.

    Raises:
        NotExpressibleError: if the model is no plain decoder, or a mixture cannot be stored in the family.
        OptionError: if a layer does not exist.
    """
    base_type = getattr(model.config, "base_model_type", model.config.model_type)
    config_class, model_class = family(base_type)
    if type(model) is not (model_class if isinstance(model, MixturaModel) else model_class.__mro__[2]):
        raise NotExpressibleError(f"{type(model).__name__} is not the causal language model of {base_type!r}")
    _check_layers(model, layers)
    config = _config(model.config, config_class, base_type, layers)
    with torch.device("meta"):
        made = model_class(config)
    _transplant(model, made, config)
    _attach(made, layers)
    return made.train(model.training)


def _config(old: Any, config_class: type, base_type: str, layers: dict[int, Mixture]) -> Any:
    fields = old.to_dict()
    fields.pop("model_type", None)
    kept = fields.pop("mixtura", {"layers": {}})["layers"]
    specs = {**kept, **{str(i): _check_storable(mixture).config for i, mixture in sorted(layers.items())}}
    fields |= {"base_model_type": base_type, "mixtura": {"version": VERSION, "layers": specs}}
    config = config_class(**fields)
    config._attn_implementation = old._attn_implementation
    if isinstance(old, MixturaConfig):
        config._experts_implementation = old._experts_implementation
    return config


def _check_layers(model: PreTrainedModel, layers: dict[int, Mixture]) -> None:
    sites = feed_forward_sites(model)
    for number in layers:
        if not 0 <= number < len(sites):
            raise OptionError(f"layers must lie in 0 .. {len(sites) - 1}, got {number}")
        sites[number].check_replaceable()


def _check_storable(mixture: Mixture) -> Mixture:
    if isinstance(mixture.experts, ExpertGroup) and len(mixture.experts.forms) > MAX_FORMS:
        raise NotExpressibleError(
            f"a group of the family has at most {MAX_FORMS} forms, got {len(mixture.experts.forms)}"
        )
    for module in mixture.modules():
        if isinstance(module, Experts) and (module.is_transposed or not module.is_concatenated):
            raise NotExpressibleError("experts of the family are stored neither transposed nor interleaved")
    return mixture


def _transplant(model: PreTrainedModel, made: PreTrainedModel, config: Any) -> None:
    """Move the modules of ``model`` into ``made``, and let all of them see the one configuration."""
    old = model.config
    for name, child in model.named_children():
        setattr(made, name, child)
    for module in made.modules():
        if getattr(module, "config", None) is old:
            module.config = config
    made.generation_config = model.generation_config
    made.name_or_path = model.name_or_path


def _attach(model: Any, layers: dict[int, Mixture]) -> None:
    """Put the mixtures in their places, on the backend of the configuration, and let forward calls open a state."""
    sites = feed_forward_sites(model)
    for number, mixture in layers.items():
        sites[number].put(mixture)
    for mixture in mixtures(model).values():
        for module in mixture.modules():
            if isinstance(module, Experts):
                module.backend = _ConfiguredBackend(model.config)
    attach_state(model)


def mixtures(model: nn.Module) -> dict[str, Mixture]:
    """The mixtures of a model by the number of their decoder layer, as text; also under PEFT."""
    return {module.layer: module for module in model.modules() if isinstance(module, Mixture)}


AutoConfig.register("mixtura", MixturaConfig)
