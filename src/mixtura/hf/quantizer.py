"""The quantizer ``mixtura`` of transformers: experts with 8 or 4 bits, loaded, saved and loaded again.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=MixturaQuantizationConfig(bits=4))

Importing this module registers it, so a folder that was saved so needs no option to be loaded: ``config.json`` names
the quantizer, and codes and scales are read as they were written. With ``linears=True`` linear layers are quantized,
too, but for routers, layers whose weight the model's own code reads (see ``read_weights``) and a head that is tied to
the embeddings; ``head=True`` unties such a head and quantizes a copy of the matrix, which embeddings keep with all its
bits. Everything else stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixtura.core.errors import NotExpressibleError, OptionError, unknown_name
from mixtura.hf.native import ROUTER_NAMES
from mixtura.hf.read_weights import is_read
from mixtura.nn.experts.quantization import Quantization
from mixtura.nn.experts.quantized import (
    QuantizedExperts,
    check_experts,
    dequantize_experts,
    quantize_experts,
    quantize_stack,
)
from mixtura.nn.quantized_linear import (
    QuantizedLinear,
    check_linear,
    dequantize_linear,
    quantize_linear,
    quantize_matrix,
)

METHOD = "mixtura"
_FIELDS = tuple(field.name for field in dataclasses.fields(Quantization))
_OPTIONS = (*_FIELDS, "linears", "head")
_ROUTERS = (*ROUTER_NAMES, "shared_expert_gate")


@register_quantization_config(METHOD)
class MixturaQuantizationConfig(QuantizationConfigMixin):
    """How weights are quantized; the fields of ``Quantization``, as transformers stores them, and what is quantized.

    Args:
        options: see ``mixtura.nn.experts.quantization.Quantization``: bits, group_size, zero_point, scale_dtype,
            activation_bits; ``linears``, whether linear layers are quantized beside experts, by default False; and
            ``head``, whether a head that is tied to the embeddings gets a quantized matrix of its own, by default
            False: embeddings stay as they are, so it needs more memory, but a step reads fewer bytes, which counts
            most in small models with large vocabularies.

    Raises:
        OptionError: for a value that is not accepted, or ``head`` without ``linears``.
        UnknownNameError: for any other option.
    """

    def __init__(self, **options: Any) -> None:
        for name in options:
            if name not in (*_OPTIONS, "quant_method"):
                raise unknown_name("option of the quantizer", name, _OPTIONS)
        if options.pop("quant_method", METHOD) != METHOD:
            raise OptionError(f"quant_method must be {METHOD!r}")
        self.quant_method, self.linears, self.head = METHOD, options.pop("linears", False), options.pop("head", False)
        for name in ("linears", "head"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.head and not self.linears:
            raise OptionError("head=True needs linears=True: a head is a linear layer")
        vars(self).update(dataclasses.asdict(Quantization(**options)))

    @property
    def quantization(self) -> Quantization:
        """The same as the library has it."""
        return Quantization(**{name: getattr(self, name) for name in _FIELDS})


@register_quantizer(METHOD)
class MixturaQuantizer(HfQuantizer):
    """Quantizes experts when they are loaded, or loads them quantized."""

    requires_calibration = False

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` writes codes and scales."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters may be trained on top: tokens have gradients, codes have none."""
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        _quantize(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.quantization_config.head and (head := _head_to_untie(model)) is not None:
            _untie(model, head)
            quantize_linear(head, self.quantization_config.quantization)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.is_loading = False
        for module in model.modules():  # loading lets everything learn that is a floating-point number
            if isinstance(module, QuantizedExperts | QuantizedLinear):
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.requires_grad_(parameter.requires_grad and not name.endswith(("_scale", "_zero")))

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor that is being loaded is a weight with all its bits."""
        place, _, name = param_name.rpartition(".")
        module = None if self.pre_quantized else model.get_submodule(place)
        if isinstance(module, QuantizedLinear):
            return name == "weight"
        return isinstance(module, QuantizedExperts) and name in module.rows

    def get_quantize_ops(self) -> ConversionOps:
        """What makes codes and scales of a weight."""
        return _Quantize()

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Give the model weights again; without a type that which they had, converted since as the model was."""
        self._dequantize(model, dtype)  # theirs takes the configuration's, which a conversion in memory leaves as it is
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for module in list(model.modules()):
            if isinstance(module, QuantizedExperts):
                dequantize_experts(module, dtype)
            elif isinstance(module, QuantizedLinear):
                dequantize_linear(module, dtype)
        return model


class _Quantize(ConversionOps):
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Codes, scales and zeros by their full names."""
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        place, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(place)
        if isinstance(module, QuantizedLinear):
            codes = quantize_matrix(weight, module.quantization)
        else:
            codes = quantize_stack(module, name, weight, module.quantization)
        named = zip(("", "_scale", "_zero"), codes, strict=True)
        return {full_layer_name + suffix: tensor for suffix, tensor in named if tensor is not None}


def quantize_model(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Quantize a model in memory, module by module and in place; it can be saved like a loaded one.

    Args:
        model: of transformers or of the family, with all its bits.
        options: see ``MixturaQuantizationConfig``.

    Raises:
        NotExpressibleError: if it has nothing to quantize, or is quantized already.
        OptionError: for an option that is not accepted; the model is as it was.
    """
    config = MixturaQuantizationConfig(**options)
    if getattr(model, "is_quantized", False):
        raise NotExpressibleError(f"the model is quantized already, by {model.quantization_method!r}")
    _quantize(model, config)
    model.hf_quantizer = MixturaQuantizer(config, pre_quantized=False)
    model.is_quantized, model.quantization_method = True, METHOD
    model.hf_quantizer.postprocess_model(model)
    return model


def _quantize(model: PreTrainedModel, config: MixturaQuantizationConfig) -> None:
    """Give all stacked experts, ours and transformers', and if asked for linear layers their new form."""
    experts = {name: module for name, module in model.named_modules() if _is_stacked(module)}
    linears = dict(_linears(model)) if config.linears else {}
    if not experts and not linears:
        wanted = "stacked experts" + (" and no linear layers" if config.linears else "")
        raise NotExpressibleError(f"{type(model).__name__} has no {wanted} to quantize")
    head = _head_to_untie(model) if config.head else None
    for name, module in model.named_modules():
        if name in experts:
            check_experts(module, config.quantization, name)
        elif name in linears or module is head:
            check_linear(module, config.quantization, name)
    for module in experts.values():
        quantize_experts(module, config.quantization)
    for linear in linears.values():
        quantize_linear(linear, config.quantization)


def _is_stacked(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    return "has_gate" in vars(module) and down is not None and down.ndim == 3


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    tied = _tied_head(model)
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or module is tied or name.rpartition(".")[2] in _ROUTERS:
            continue
        if not is_read(model, name):
            yield name, module


def _tied_head(model: PreTrainedModel) -> nn.Linear | None:
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)  # some configurations lack it
    return model.get_output_embeddings() if tied else None


def _head_to_untie(model: PreTrainedModel) -> nn.Linear | None:
    head = _tied_head(model)
    name = next((name for name, module in model.named_modules() if module is head), "")
    return None if is_read(model, name) else head


def _untie(model: PreTrainedModel, head: nn.Linear) -> None:
    """Let the head have a matrix of its own, with the values of the embeddings."""
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
