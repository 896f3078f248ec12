"""``install``: routers of ours decide in the native mixtures of a model, and a receipt says what that changed.

The experts stay as they are; the model becomes one of the family mixtura, since a stock loader would drop the router in
silence. With ``start="native"`` the new gate starts with the rows of the old one, and chooses as the family does unless
told otherwise: nothing changes but what is asked for.

D width, E experts, K slots a token.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import nn

from mixtura.core import registry
from mixtura.core.errors import MixturaError, NotExpressibleError, OptionError, unknown_name
from mixtura.core.layers import chosen_layers
from mixtura.hf.contract import Seen, check_family, family_name, watch
from mixtura.hf.modeling import convert
from mixtura.hf.native import NativeMixture, expert_blocks
from mixtura.hf.native_start import native_options, start_from
from mixtura.hf.seat import router_name

Start = Literal["native", "random"]
RouterFactory: TypeAlias = Callable[[str, int, int], nn.Module]


class Installed(NamedTuple):
    """A model of the family, and its receipt.

    Attributes:
        model: shares its other weights with the native model, which must not be used any more.
        receipt: plain JSON.
    """

    model: Any
    receipt: dict[str, Any]


def install(
    model: Any,
    router: str | RouterFactory,
    *,
    layers: str | Sequence[int] = "all",
    start: Start = "native",
    allow: Iterable[str] = (),
    tokens_BQ: torch.Tensor | None = None,
    **options: Any,
) -> Installed:
    """Let routers of ours decide in native mixtures.

    Args:
        model: causal language model of transformers with decorated experts, or one of the family that has some.
        router: key of a method, built for every layer with the D and E of its block; or a function
            (layer, D, E) -> router, an instance of a registered method.
        layers: "all" native mixtures, or "last:6", "first:2", "every:2", "24-29", numbers of decoder layers.
        start: "native" begins with the rows of the old gate and its bias, and takes options of the selection that are
            not given from the family; "random" takes the method's own for both.
        allow: keys of methods that may read later tokens.
        tokens_BQ: token ids that the logits are compared on; by default 2 x 64 drawn ones.
        **options: of the method.

    Returns:
        The new model and its receipt: options, layers, how far its logits are from the native model's on the tokens,
        and parameters before and after.

    Raises:
        UnknownNameError: for an unknown key, with the nearest.
        OptionError: on a wrong option, layers without a native mixture, or a router that cannot start from the old one.
        NotExpressibleError: if the family or a block does not keep the contract of the two seams, the router does not
            fit a block, or reads later tokens and is not allowed to.

    Example:
        >>> model, receipt = install(model, "aux-loss-free-bias", layers="last:6", rate=1e-3)
    """
    check_family(model)
    if start not in get_args(Start):
        raise OptionError(f"start must be one of 'native', 'random', got {start!r}")
    blocks = _chosen_blocks(model, layers)
    tokens_BQ = _default_tokens(model) if tokens_BQ is None else tokens_BQ
    with watch(model, blocks) as seen:
        before = _logits(model, tokens_BQ)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    made = {layer: _build(model, router, layer, block, seen[layer], start, options) for layer, block in blocks.items()}
    installed = convert(model, {}, routers=made, allow=allow)
    after = _logits(installed, tokens_BQ)
    difference = float((after.float() - before.float()).abs().max())
    if not torch.isfinite(after).all():
        raise MixturaError("the logits of the model with its new routers are not finite")
    receipt = {
        "router": sorted({router_name(one) for one in made.values()}),
        "options": _shown(next(iter(made.values()))),
        "layers": list(blocks),
        "start": start,
        "allow": sorted(installed.config.mixtura["allow"]),
        "max_logit_difference": difference,
        "bit_equal": difference == 0,
        "dtype": str(before.dtype).removeprefix("torch."),
        "tokens_checked": tokens_BQ.numel(),
        "parameters": {"before": parameters, "after": sum(p.numel() for p in installed.parameters())},
        "versions": {name: importlib.metadata.version(name) for name in ("mixtura", "transformers", "torch")},
    }
    return Installed(installed, receipt)


def _chosen_blocks(model: Any, layers: str | Sequence[int]) -> dict[str, NativeMixture]:
    blocks = expert_blocks(model)
    if not blocks:
        raise NotExpressibleError(
            f"{family_name(model)} has no experts that transformers decorates: none can be routed to"
        )
    if layers == "all":
        return blocks
    numbers = chosen_layers(layers, model.config.get_text_config().num_hidden_layers)
    holding = {int(layer.partition(".")[0]) for layer in blocks}
    if missing := sorted(set(numbers) - holding):
        raise OptionError(f"layers must have native mixtures, as {', '.join(blocks)} have; got {missing}")
    return {layer: block for layer, block in blocks.items() if int(layer.partition(".")[0]) in numbers}


def _build(
    model: Any,
    router: str | RouterFactory,
    layer: str,
    block: NativeMixture,
    seen: Seen,
    start: Start,
    options: Mapping[str, Any],
) -> nn.Module:
    """The router of one layer, with the device and type of the old one, and its start."""
    if isinstance(router, str):
        known = {"dim": seen.dim, "num_experts": block.num_experts, "vocabulary": model.config.vocab_size}
        known |= native_options(model, seen.k) if start == "native" else {}
        method = find_router(router)
        built = method(**{**{name: value for name, value in known.items() if name in method.options}, **options})
    elif options:
        raise OptionError(f"options are of a method that is named by its key, got a function and {sorted(options)}")
    else:
        built = router(layer, seen.dim, block.num_experts)
    like = next(block.router.parameters(), None)  # type: ignore[union-attr]
    built = built.to(next(block.experts.parameters()) if like is None else like)
    if start == "native":
        start_from(built, block, layer)
    return built.train(model.training)


def find_router(key: str) -> registry.Method:
    """The router of that key.

    Raises:
        UnknownNameError: with the nearest key of a router.
    """
    known = {row.key: row for row in registry.methods("router")}
    if key not in known:
        raise unknown_name("router", key, known)
    return known[key]


def _shown(router: nn.Module) -> dict[str, Any]:
    """Options of a router that are not known from its place."""
    config: Mapping[str, Any] = getattr(router, "method_config", {})
    return {name: value for name, value in config.items() if name not in ("method", "dim", "num_experts")}


def _default_tokens(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (2, 64), generator=generator)


@torch.no_grad()
def _logits(model: Any, tokens_BQ: torch.Tensor) -> torch.Tensor:
    training = model.training
    logits = model.eval()(tokens_BQ.to(model.device), use_cache=False).logits
    model.train(training)
    return logits  # type: ignore[no-any-return]
