"""The quantizer ``mixtura`` of transformers: the experts of any model with 8 or 4 bits, loaded, saved and loaded again.

    AutoModelForCausalLM.from_pretrained(name, quantization_config=MixturaQuantizationConfig(bits=4))

Importing this module registers it, so a folder that was saved so needs no option to be loaded: ``config.json`` names
the quantizer, and codes and scales are read as they were written. Everything but the weights of experts stays as it is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixtura.core.errors import NotExpressibleError, OptionError, unknown_name
from mixtura.nn.experts.quantization import Quantization
from mixtura.nn.experts.quantized import QuantizedExperts, dequantize_experts, quantize_experts, quantize_stack

METHOD = "mixtura"
_FIELDS = tuple(field.name for field in dataclasses.fields(Quantization))


@register_quantization_config(METHOD)
class MixturaQuantizationConfig(QuantizationConfigMixin):
    """How experts are quantized; the fields of ``Quantization``, as transformers stores them.

    Args:
        options: see ``mixtura.nn.experts.quantization.Quantization``: bits, group_size, zero_point, scale_dtype,
            activation_bits.

    Raises:
        OptionError: for a value that is not accepted.
        UnknownNameError: for any other option.
    """

    def __init__(self, **options: Any) -> None:
        for name in options:
            if name not in (*_FIELDS, "quant_method"):
                raise unknown_name("option of the quantizer", name, _FIELDS)
        if options.pop("quant_method", METHOD) != METHOD:
            raise OptionError(f"quant_method must be {METHOD!r}")
        self.quant_method = METHOD
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
        for experts in _experts(model):
            quantize_experts(experts, self.quantization_config.quantization)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor that is being loaded is a weight of experts with all its bits."""
        place, _, name = param_name.rpartition(".")
        experts = None if self.pre_quantized else model.get_submodule(place)
        return isinstance(experts, QuantizedExperts) and name in experts.rows

    def get_quantize_ops(self) -> ConversionOps:
        """What makes codes and scales of a weight."""
        return _Quantize()

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for experts in _experts(model):
            dequantize_experts(experts, dtype or torch.float32)
        return model


class _Quantize(ConversionOps):
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Codes, scales and zeros by their full names."""
        (weight,) = input_dict.values()
        weight_ECD = weight[0] if isinstance(weight, list) else weight
        place, _, name = full_layer_name.rpartition(".")
        experts = model.get_submodule(place)
        codes = quantize_stack(experts, name, weight_ECD, experts.quantization)
        named = zip(("", "_scale", "_zero"), codes, strict=True)
        return {full_layer_name + suffix: tensor for suffix, tensor in named if tensor is not None}


def quantize_model(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Quantize the experts of a model in memory, layer by layer and in place; it can be saved like a loaded one.

    Args:
        model: of transformers or of the family, with all its bits.
        options: see ``MixturaQuantizationConfig``.

    Raises:
        NotExpressibleError: if it has no stacked experts, or is quantized already.
        OptionError: for an option that is not accepted; the model is as it was.
    """
    config = MixturaQuantizationConfig(**options)
    if getattr(model, "is_quantized", False):
        raise NotExpressibleError(f"the model is quantized already, by {model.quantization_method!r}")
    for experts in _experts(model):
        quantize_experts(experts, config.quantization)
    model.hf_quantizer = MixturaQuantizer(config, pre_quantized=False)
    model.is_quantized, model.quantization_method = True, METHOD
    model.hf_quantizer.postprocess_model(model)
    return model


def _experts(model: nn.Module) -> list[nn.Module]:
    """All stacked experts, ours and transformers'."""
    found = [module for module in model.modules() if _is_stacked(module)]
    if not found:
        raise NotExpressibleError(f"{type(model).__name__} has no stacked experts to quantize")
    return found


def _is_stacked(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    return "has_gate" in vars(module) and down is not None and down.ndim == 3
