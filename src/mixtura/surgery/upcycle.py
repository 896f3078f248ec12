"""``upcycle``: dense feed-forward layers of a model become mixtures, and a receipt says what that changed."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mixtura.core import registry
from mixtura.core.errors import MixturaError, OptionError, unknown_name
from mixtura.core.layers import chosen_layers
from mixtura.nn.mixture import Mixture

TOLERANCE = 1e-4  # of logits in float32
ROUNDINGS = 16  # of logits in half precision, in units of the type's precision


class Upcycled(NamedTuple):
    """A model of the family, and its receipt.

    Attributes:
        model: shares its other weights with the dense model, which must not be used any more.
        receipt: plain JSON.
    """

    model: Any
    receipt: dict[str, Any]


def upcycle(
    model: Any,
    method: str = "sparse-upcycling",
    *,
    layers: str | Sequence[int] = "every:2",
    tokens_BQ: torch.Tensor | None = None,
    router_rows: Mapping[int, torch.Tensor] | None = None,
    **options: Any,
) -> Upcycled:
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
    from mixtura.hf.count import count_parameters

    made_by = find_surgery(method)
    numbers = chosen_layers(layers, model.config.num_hidden_layers)
    tokens_BQ = _default_tokens(model) if tokens_BQ is None else _check_tokens(tokens_BQ, model.config.vocab_size)
    before, counts = _logits(model, tokens_BQ), count_parameters(model)
    sites = feed_forward_sites(model)
    made = {i: made_by(sites[i].read(), **{**options, **_rows(router_rows, i)}) for i in numbers}
    promised = all(conversion.preserves for conversion in made.values())
    converted = convert(model, {i: conversion.mixture for i, conversion in made.items()})
    difference = (_logits(converted, tokens_BQ).float() - before.float()).abs().max()
    after = count_parameters(converted)
    receipt = {
        "method": method,
        "options": {name: options.get(name, default) for name, default in default_options(made_by).items()},
        "router": "random" if router_rows is None and "router_rows_CD" not in options else "fitted",
        "tied_router_rows": max(_tied_rows(conversion.mixture) for conversion in made.values()),
        "layers": numbers,
        "preserves_the_function": promised,
        "max_logit_difference": float(difference),
        "bit_equal": float(difference) == 0,
        "dtype": str(before.dtype).removeprefix("torch."),
        "tokens_checked": tokens_BQ.numel(),
        "parameters": {"before": counts.total, "after": after.total},
        "active_parameters": {"before": counts.active, "after": after.active},
        "versions": {name: importlib.metadata.version(name) for name in ("mixtura", "transformers", "torch")},
    }
    _check_promise(receipt, before)
    return Upcycled(converted, receipt)


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


def _default_tokens(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (2, 64), generator=generator)


def _check_tokens(tokens_BQ: torch.Tensor, vocabulary: int) -> torch.Tensor:
    if tokens_BQ.ndim != 2 or tokens_BQ.is_floating_point() or not tokens_BQ.numel():
        raise OptionError(f"tokens_BQ must be token ids (B, Q), got {tokens_BQ.dtype} of {tuple(tokens_BQ.shape)}")
    low, high = int(tokens_BQ.min()), int(tokens_BQ.max())
    if low < 0 or high >= vocabulary:
        raise OptionError(f"tokens_BQ must lie in 0 .. {vocabulary - 1}, got {low} .. {high}")
    return tokens_BQ


@torch.no_grad()
def _logits(model: Any, tokens_BQ: torch.Tensor) -> torch.Tensor:
    training = model.training
    logits = model.eval()(tokens_BQ.to(model.device), use_cache=False).logits
    model.train(training)
    return logits  # type: ignore[no-any-return]


def _check_promise(receipt: Mapping[str, Any], before: torch.Tensor) -> None:
    """Raise unless logits are equal up to rounding."""
    difference = receipt["max_logit_difference"]
    if not math.isfinite(difference):
        raise MixturaError("the logits of the upcycled model are not finite")
    allowed = max(TOLERANCE, ROUNDINGS * torch.finfo(before.dtype).eps) * max(1.0, float(before.abs().max()))
    if receipt["preserves_the_function"] and difference > allowed:
        raise MixturaError(
            f"{receipt['method']} promised equal logits, but they differ by {difference:.2e} on "
            f"{receipt['tokens_checked']} tokens; this is a bug, please report it with the receipt"
        )
