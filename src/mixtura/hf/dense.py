"""``put_dense``: dense feed-forward layers in the places of mixtures, as the base family has them.

D width, F width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixtura.core.errors import NotExpressibleError
from mixtura.hf.modeling import mixtures, transplant
from mixtura.hf.sites import Holder, Site, feed_forward_sites
from mixtura.nn.dense import FeedForwardWeights
from mixtura.nn.experts.activations import ACTIVATIONS

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


def put_dense(model: Any, layers: Mapping[int, FeedForwardWeights]) -> Any:
    """The model with dense layers instead of mixtures; one of its base family if no mixture is left.

    Args:
        model: of the family mixtura; it must not be used afterwards. It stays as it is if this raises.
        layers: weights by number of the decoder layer.

    Raises:
        NotExpressibleError: if the base family has no such feed-forward, or not of this width in these layers alone.
    """
    left = sorted(set(map(int, mixtures(model))) - set(layers))
    stock = _stock_of_width(model.config, sorted({weights.width for weights in layers.values()}), set(layers), left)
    sites, stocks = feed_forward_sites(model), feed_forward_sites(stock)
    for number, weights in layers.items():
        _fill(stocks[number], weights)
    for number in layers:
        _exchange(sites[number].parent, stocks[number].parent, model.training)
        model.config.mixtura["layers"].pop(str(number))
    if left or model.config.mixtura.get("routers"):
        return model
    transplant(model, stock, stock.config)
    return stock.train(model.training)


def _stock_of_width(old: Any, widths: list[int], layers: set[int], left: list[int]) -> Any:
    """The base family's model on the meta device, whose feed-forwards have the width of the new layers."""
    ours = ("model_type", "mixtura", "base_model_type")
    fields = {name: value for name, value in old.to_dict().items() if name not in ours}
    stock = _stock(old, fields)
    bound = _width(stock)
    if widths == [bound]:
        return stock
    stay = left or [i for i in range(old.num_hidden_layers) if i not in layers]
    if len(widths) == 1 and not stay:
        for name in _WIDTHS:
            other = _stock(old, {**fields, name: widths[0]}) if name in fields else None
            if other is not None and _width(other) == widths[0]:
                return other
    others = f", as layer {stay[0]} has it" if stay else ""
    raise NotExpressibleError(
        f"all feed-forwards of a {old.base_model_type} have one width, here {bound}{others}; the dense layers "
        f"would have {', '.join(map(str, widths))}"
    )


def _stock(old: Any, fields: Mapping[str, Any]) -> Any:
    config = CONFIG_MAPPING[old.base_model_type](**fields)
    config._attn_implementation = old._attn_implementation
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def _width(model: Any) -> int:
    site = feed_forward_sites(model)[0]
    return int(getattr(site.module, site.parts[-1]).weight.numel()) // site.dim


@torch.no_grad()
def _fill(site: Site, weights: FeedForwardWeights) -> None:
    """Give a feed-forward on the meta device these weights.

    Raises:
        NotExpressibleError: if it is of another form.
    """
    like = weights.up_FD
    parts = [getattr(site.module, part) for part in site.parts]
    for part in parts if site.inline else [site.module]:
        part.to_empty(device=like.device).to(like.dtype)
        for parameter in part.parameters():
            parameter.zero_()  # reading compares what the layer computes with what its weights say
    there = site.read()
    where = f"layer {site.layer}: the feed-forward of the base family"
    if (there.gate_FD is None) != (weights.gate_FD is None):
        raise NotExpressibleError(f"{where} is {'plain' if there.gate_FD is None else 'gated'}, the experts are not")
    if ACTIVATIONS[there.activation] is not ACTIVATIONS[weights.activation]:
        raise NotExpressibleError(f"{where} has activation {there.activation}, the experts have {weights.activation}")
    for name, theirs, ours in zip(there._fields[:6], there[:6], weights[:6], strict=True):
        if theirs is not None and ours is not None:
            if theirs.shape != ours.shape:
                raise NotExpressibleError(f"{where} has {name} of shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
            theirs.copy_(ours)
        elif ours is not None and ours.any():
            raise NotExpressibleError(f"{where} has no {name}, the experts have one")


def _exchange(parent: nn.Module, stock: nn.Module, training: bool) -> None:
    """Put what the stock layer has in the place of the holder, and of what stood idle beside it (OPT)."""
    for name, child in list(parent.named_children()):
        theirs = getattr(stock, name)
        if isinstance(child, Holder) or (isinstance(child, nn.Identity) and not isinstance(theirs, nn.Identity)):
            setattr(parent, name, theirs.train(training))
