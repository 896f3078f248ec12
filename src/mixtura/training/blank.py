"""The model of a recipe without weights, on the meta device: as many parameters, at no cost."""

from __future__ import annotations

from typing import Any

import torch

from mixtura.core.errors import FileFormatError
from mixtura.training.recipe import Recipe


def blank_model(recipe: Recipe) -> Any:
    """Build what ``starting_point`` would load and upcycle; one layer's weights at a time are really there.

    Raises:
        FileFormatError: if there is no such model.
        OptionError: if an option of the upcycling does not exist or does not fit.
        NotExpressibleError: if a layer to upcycle is no dense feed-forward.
    """
    from transformers import AutoModelForCausalLM

    import mixtura.hf  # noqa: F401  registers the family

    config = _config(recipe.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model if recipe.upcycle is None else _upcycled(model, **recipe.upcycle)


def _config(name: str) -> Any:
    """Configuration of a folder or a Hub id; a known model is small, and is loaded for it."""
    from transformers import AutoConfig

    from mixtura.hf.load import KNOWN, load_model

    if name in KNOWN or name.endswith(".gguf"):
        return load_model(name)[0].config
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"model {name!r} cannot be read: {str(error).splitlines()[0]}") from None


def _upcycled(model: Any, method: str = "sparse-upcycling", layers: Any = "every:2", **options: Any) -> Any:
    from mixtura.core import registry
    from mixtura.core.layers import chosen_layers
    from mixtura.hf import convert, feed_forward_sites
    from mixtura.nn import Mixture

    surgery, sites, made = registry.get(method), feed_forward_sites(model), {}
    for number in chosen_layers(layers, model.config.num_hidden_layers):
        holder = sites[number].module.to_empty(device="cpu")
        for parameter in holder.parameters():
            torch.nn.init.zeros_(parameter)
        config = surgery(sites[number].read(), **options).mixture.config
        holder.to("meta")
        with torch.device("meta"):
            made[number] = Mixture.from_config(config)
    return convert(model, made)
