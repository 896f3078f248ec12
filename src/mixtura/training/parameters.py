"""Which parameters a run trains: the others are frozen, get no gradient and no autograd graph below them."""

from __future__ import annotations

from typing import Any

from torch import nn

from mixtura.core.errors import OptionError
from mixtura.training.recipe import TrainRecipe


def freeze_all_but(model: Any, train: TrainRecipe) -> dict[str, nn.Parameter]:
    """Let exactly the parameters that the recipe names require a gradient.

    Args:
        model: causal language model of transformers, of the family or dense.
        train: its ``parameters`` and ``router_learning_rate`` decide.

    Returns:
        The trained parameters by name.

    Raises:
        OptionError: if the model has no mixtures, or not the layers that are named.
    """
    chosen = {id(parameter) for parameter in _chosen(model, train)}
    if train.router_learning_rate == 0:
        chosen -= {id(parameter) for parameter in router_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def router_parameters(model: Any) -> list[nn.Parameter]:
    """Parameters of all routers of ours."""
    from mixtura.hf.modeling import routers

    return [parameter for router in routers(model).values() for parameter in router.parameters()]


def _chosen(model: Any, train: TrainRecipe) -> list[nn.Parameter]:
    from mixtura.hf import mixtures

    if train.parameters == "all":
        return list(model.parameters())
    if train.parameters == "mixtures":
        found = mixtures(model)
        if not found:
            raise OptionError(
                f"train.parameters is 'mixtures', but {type(model).__name__} has none; upcycle it, or name "
                "'feed-forward:FIRST-LAST' or 'all'"
            )
        return [parameter for mixture in found.values() for parameter in mixture.parameters()]
    return [parameter for number in train.feed_forward_layers for parameter in _feed_forward(model, number)]


def _feed_forward(model: Any, number: int) -> list[nn.Parameter]:
    from mixtura.hf import feed_forward_sites

    sites = feed_forward_sites(model)
    if number >= len(sites):
        raise OptionError(f"train.parameters names layer {number}, but the layers are 0 .. {len(sites) - 1}")
    site = sites[number]
    parts = [getattr(site.parent, part) for part in site.parts] if site.inline else [site.module]
    return [parameter for part in parts for parameter in part.parameters()]
