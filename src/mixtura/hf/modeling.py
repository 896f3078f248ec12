"""The family ``mixtura``: any decoder of transformers, some of whose layers are our mixtures or have routers of ours.

For every base family a configuration and a model class are made once, as subclasses of the base's own. The
configuration is flat: the base's fields, ``base_model_type``, and ``mixtura``, which holds a version, by the number of
the decoder layer ``Mixture.config`` (``layers``) and the methods of routers in native mixtures (``routers``), and the
methods that are allowed to read later tokens (``allow``). After ``import mixtura.hf`` the Auto classes load it like any
other; on disk every expert has tensors of its own.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterable, Mapping
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
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixtura.core import registry
from mixtura.core.errors import FileFormatError, MixturaWarning, NotExpressibleError, OptionError, unknown_name
from mixtura.hf.backends import experts_backend
from mixtura.hf.conversions import MAX_FORMS, around
from mixtura.hf.forward import attach_state, with_state
from mixtura.hf.native import expert_blocks
from mixtura.hf.seat import Seat, router_name, seats
from mixtura.hf.sites import feed_forward_sites
from mixtura.nn.causality import sees_future
from mixtura.nn.experts.feed_forward import Experts
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.mixture import Mixture, method_config

VERSION = 2  # 1 had no routers in native mixtures
DEFAULT_BACKEND = "mixtura"


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
            seated = {layer: registry.build(spec) for layer, spec in config.mixtura.get("routers", {}).items()}
        for name in map(router_name, (*(mixture.router for mixture in layers.values()), *seated.values())):
            if not registry.get(name).causal:
                _check_allowed(name, config.mixtura.get("allow", ()))
        _attach(self, layers, seated)

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
        places = (".mixture.", *(f".{name}." for name, module in model.named_modules() if isinstance(module, Seat)))
        _refuse("unexpected", [key for key in info["unexpected_keys"] if any(place in f".{key}" for place in places)])
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
    register_checkpoint_conversion_mapping(name, around(theirs), overwrite=True)
    doc = f"``{base.__name__}`` of which some layers are mixtures; see ``MixturaModel``."
    members = {"config_class": config_class, "__module__": __name__, "__annotations__": {"config": config_class}}
    return _export(type(name, (MixturaModel, base), {**members, "__doc__": doc}))


def _export(cls: type) -> type:
    """Give a made class its place in this module, where pickle and deepcopy look for it."""
    setattr(sys.modules[__name__], cls.__name__, cls)
    return cls


def convert(
    model: PreTrainedModel,
    layers: Mapping[int, Mixture],
    *,
    routers: Mapping[str, nn.Module] | None = None,
    allow: Iterable[str] = (),
) -> Any:
    """The model as one of the family, with mixtures in some decoder layers, or routers of ours in native mixtures.

    All other weights are shared, not copied: ``model`` must not be used afterwards.

    Args:
        model: causal language model of transformers, or of the family already (its mixtures and routers stay).
        layers: mixture by number of the decoder layer.
        routers: router by the name of a native mixture, the number of its decoder layer as text; the block stays.
        allow: keys of router methods that may read later tokens; saved with the model.

    Raises:
        NotExpressibleError: if the model is no plain decoder, a mixture or router cannot be stored in the family or
            does not fit the block, or a router that is not allowed to reads later tokens.
        OptionError: if a layer does not exist, or the configuration asks for output_router_logits.
    """
    routers = routers or {}
    base_type = getattr(model.config, "base_model_type", model.config.model_type)
    config_class, model_class = family(base_type)
    if type(model) is not (model_class if isinstance(model, MixturaModel) else model_class.__mro__[2]):
        raise NotExpressibleError(f"{type(model).__name__} is not the causal language model of {base_type!r}")
    _refuse_native_logits(model)
    _check_layers(model, layers)
    ours = _ours(model.config, layers, routers, allow)
    for router in (*(mixture.router for mixture in layers.values()), *routers.values()):
        if sees_future(router):
            _check_allowed(router_name(router), ours["allow"])
    config = _config(model.config, config_class, base_type, ours)
    with torch.device("meta"):
        made = model_class(config)
    transplant(model, made, config)
    _attach(made, layers, routers)
    return made.train(model.training)


def _ours(
    old: Any, layers: Mapping[int, Mixture], routers: Mapping[str, nn.Module], allow: Iterable[str]
) -> dict[str, Any]:
    """What the configuration says of the family: what it said before, and what is new."""
    kept = {"layers": {}, "routers": {}, "allow": [], **getattr(old, "mixtura", {})}
    specs = {**kept["layers"], **{str(i): _check_storable(mixture).config for i, mixture in sorted(layers.items())}}
    stay = {layer: spec for layer, spec in kept["routers"].items() if layer.partition(".")[0] not in specs}
    return {
        "version": VERSION,
        "layers": specs,
        "routers": {**stay, **{layer: method_config(router) for layer, router in routers.items()}},
        "allow": sorted({*kept["allow"], *allow}),
    }


def _config(old: Any, config_class: type, base_type: str, ours: dict[str, Any]) -> Any:
    fields = {name: value for name, value in old.to_dict().items() if name not in ("model_type", "mixtura")}
    config = config_class(**fields | {"base_model_type": base_type, "mixtura": ours})
    config._attn_implementation = old._attn_implementation
    if isinstance(old, MixturaConfig):
        config._experts_implementation = old._experts_implementation
    return config


def _check_layers(model: PreTrainedModel, layers: Mapping[int, Mixture]) -> None:
    sites = feed_forward_sites(model) if layers else []
    for number in layers:
        if not 0 <= number < len(sites):
            raise OptionError(f"layers must lie in 0 .. {len(sites) - 1}, got {number}")
        sites[number].check_replaceable()


def _check_allowed(name: str, allow: Iterable[str]) -> None:
    """Refuse a method of routers that reads later tokens, unless it is allowed by name."""
    if name not in allow:
        raise NotExpressibleError(
            f"router {name} reads later tokens, so a decoder learns from what it cannot know in generation; allow it "
            f"by name if that is meant: allow=[{name!r}]"
        )


def _check_storable(mixture: Mixture) -> Mixture:
    if isinstance(mixture.experts, ExpertGroup) and len(mixture.experts.forms) > MAX_FORMS:
        raise NotExpressibleError(
            f"a group of the family has at most {MAX_FORMS} forms, got {len(mixture.experts.forms)}"
        )
    for module in mixture.modules():
        if isinstance(module, Experts) and (module.is_transposed or not module.is_concatenated):
            raise NotExpressibleError("experts of the family are stored neither transposed nor interleaved")
    return mixture


def transplant(model: PreTrainedModel, made: PreTrainedModel, config: Any) -> None:
    """Move the modules of ``model`` into ``made``, and let all of them see the one configuration, that of ``made``."""
    old = model.config
    for name, child in model.named_children():
        setattr(made, name, child)
    for module in made.modules():
        if getattr(module, "config", None) is old:
            module.config = config
    made.generation_config = model.generation_config
    made.name_or_path = model.name_or_path


def _attach(model: Any, layers: Mapping[int, Mixture], routers: Mapping[str, nn.Module]) -> None:
    """Put mixtures and routers in their places, on the configured backend, and let forward calls open a state."""
    sites = feed_forward_sites(model) if layers else []
    for number, mixture in layers.items():
        sites[number].put(mixture)
    blocks = expert_blocks(model) if routers else {}
    for layer, router in routers.items():
        if layer not in blocks:
            known = ", ".join(blocks) or "there is none"
            raise OptionError(f"routers must lie in layers with native mixtures ({known}), got {layer!r}")
        blocks[layer].put(router, layer)
    for mixture in mixtures(model).values():
        for module in mixture.modules():
            if isinstance(module, Experts):
                module.backend = _ConfiguredBackend(model.config)
    attach_state(model)
    if _refuse_native_logits not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_refuse_native_logits, with_kwargs=True)


def _refuse_native_logits(model: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
    """transformers collects logits of its own routers alone: its balance loss would leave ours out, or fail."""
    asked = (kwargs or {}).get("output_router_logits")
    if asked or (asked is None and getattr(model.config, "output_router_logits", False)):
        raise OptionError(
            "output_router_logits must be False in calls and in the config of a model of mixtura: its routers are read "
            "from the tape (mixtura.hf.record), and balance losses are computed of that"
        )


def mixtures(model: nn.Module) -> dict[str, Mixture]:
    """The mixtures of a model by the number of their decoder layer, as text; also under PEFT."""
    return {module.layer: module for module in model.modules() if isinstance(module, Mixture)}


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Routers of ours, those in native mixtures too, by the number of their decoder layer; also under PEFT."""
    return {layer: part.router for layer, part in {**mixtures(model), **seats(model)}.items()}


AutoConfig.register("mixtura", MixturaConfig)
