"""``upcycle``: dense feed-forward layers of a model become mixtures, and a receipt says what that changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mixtura.core import registry
from mixtura.core.errors import OptionError, unknown_name
from mixtura.core.layers import chosen_layers
from mixtura.nn.mixture import Mixture
from mixtura.surgery.receipts import Before, Operated


def upcycle(
    model: Any,
    method: str = "sparse-upcycling",
    *,
    layers: str | Sequence[int] = "every:2",
    tokens_BQ: torch.Tensor | None = None,
    router_rows: Mapping[int, torch.Tensor] | None = None,
    **options: Any,
) -> Operated:
    """Turn feed-forward layers into mixtures and check what was promised.

    Args:
        model: causal language model of transformers.
        method: key of a surgery that makes a mixture of a dense layer.
        layers: "all", "last:6", "first:2", "every:2", "24-29", or numbers.
        tokens_BQ: token ids that the logits are compared on; by default 2 x 64 drawn ones.
        router_rows: by layer, rows (C, D) of the router, as ``mixtura.surgery.fitted_router`` gives them.
        **options: of the method.

    Returns:
        The new model and its receipt: whether logits were promised to stay, and how far they are from the dense
        model's on the tokens; parameters, active ones too; how many rows of the router were equal by intention.

    Raises:
        OptionError: on an unknown or wrong option, layers that do not exist, or tokens that are no ids.
        NotExpressibleError: if a layer is no dense feed-forward of a known structure.
        MixturaError: if logits differ although the method promised that they do not.
    """
    from mixtura.hf import convert, feed_forward_sites

    made_by = find_surgery(method)
    numbers = chosen_layers(layers, model.config.num_hidden_layers)
    before = Before(model, tokens_BQ)
    sites = feed_forward_sites(model)
    made = {i: made_by(sites[i].read(), **{**options, **_rows(router_rows, i)}) for i in numbers}
    promised = all(conversion.preserves for conversion in made.values())
    converted = convert(model, {i: conversion.mixture for i, conversion in made.items()})
    receipt = {
        "method": method,
        "options": {name: options.get(name, default) for name, default in default_options(made_by).items()},
        "router": "random" if router_rows is None and "router_rows_CD" not in options else "fitted",
        "tied_router_rows": max(_tied_rows(conversion.mixture) for conversion in made.values()),
        "layers": numbers,
        **before.compare(converted, method, preserves=promised),
    }
    return Operated(converted, receipt)


def find_surgery(key: str) -> registry.Method:
    """The surgery of that key.

    Raises:
        UnknownNameError: with the nearest key of a surgery.
    """
    known = {row.key: row for row in registry.methods("surgery")}
    if key not in known:
        raise unknown_name("surgery", key, known)
    return known[key]


def default_options(made_by: registry.Method) -> dict[str, Any]:
    """Options of a surgery that are plain values, with their defaults."""
    hidden = ("dense", "router_rows_CD")
    return {name: option.default for name, option in made_by.options.items() if name not in hidden}


def _rows(router_rows: Mapping[int, torch.Tensor] | None, layer: int) -> dict[str, torch.Tensor]:
    if router_rows is None:
        return {}
    if layer not in router_rows:
        raise OptionError(f"router_rows must have rows for layer {layer}, got layers {sorted(router_rows)}")
    return {"router_rows_CD": router_rows[layer]}


def _tied_rows(mixture: Mixture) -> int:
    """Rows of the gate for each different one; 1 if all differ."""
    rows_ED = mixture.router.gate.weight.detach()  # type: ignore[union-attr, operator]
    return len(rows_ED) // len(rows_ED.unique(dim=0))  # type: ignore[operator]
