"""Which parameters a run trains: the others are frozen, get no gradient and no autograd graph below them."""

from __future__ import annotations

from typing import Any

from torch import nn

from mixtura.core.errors import OptionError
from mixtura.core.roles import MIXTURES
from mixtura.training.recipe import TrainRecipe


def freeze_all_but(model: Any, train: TrainRecipe) -> dict[str, nn.Parameter]:
    """Let exactly the parameters that the recipe names be trained; single experts of a stack too.

    Args:
        model: causal language model of transformers, of the family or dense.
        train: its ``parameters`` and ``router_learning_rate`` decide.

    Returns:
        The trained parameters by name.

    Raises:
        OptionError: if the model has not what is named.
        NotExpressibleError: if single experts are named that are not stacked one by one.
    """
    from mixtura.hf.roles import freeze, unfreeze
    from mixtura.hf.tensor_roles import parameter_roles

    freeze(model, "all")
    places = {role.role for role in parameter_roles(model)}
    if train.feed_forward_layers:
        _check_layers(model, train.feed_forward_layers)
        for role in parameter_roles(model):
            wanted = role.layer in train.feed_forward_layers and role.role in ("feed-forward", *MIXTURES)
            role.tensor.requires_grad_(wanted)
    elif train.parameters == "mixtures" and places.isdisjoint(MIXTURES):
        raise OptionError(
            f"train.parameters is 'mixtures', but {type(model).__name__} has none; upcycle it, or name "
            "'feed-forward:FIRST-LAST' or 'all'"
        )
    else:
        unfreeze(model, train.roles)
    if train.router_learning_rate == 0 and "routers" in places:
        freeze(model, "routers")
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def router_parameters(model: Any) -> list[nn.Parameter]:
    """Parameters of all routers, ours and native ones."""
    from mixtura.hf.tensor_roles import parameter_roles

    return [role.tensor for role in parameter_roles(model) if role.role == "routers"]  # type: ignore[misc]


def _check_layers(model: Any, layers: list[int]) -> None:
    from mixtura.hf.sites import decoder_layers

    number = len(decoder_layers(model))
    if wrong := [layer for layer in layers if layer >= number]:
        raise OptionError(f"train.parameters names layer {wrong[0]}, but the layers are 0 .. {number - 1}")
