"""``add_expert`` and ``remove_expert``: mixtures of ours with one expert more, or some fewer.

What adding preserves depends on how the router chooses and weighs; "stays" is up to the rounding of the gate's product,
which has one row more:

    router="never"   a bias of -10,000 for the new expert: it is never chosen and its probability is exactly 0, so every
                     logit stays, for every k, score and normalization. It gets no gradient until its bias is raised.
    router="copy"    the row of the copied expert. With k = 1 a token goes to one of the two, which answer alike without
                     noise; so every logit stays if the weight does not depend on the other logits (sigmoid, relu, none,
                     or renormalized). With k >= 2 both are chosen, which pushes out the k-th expert of such tokens; a
                     softmax that is not renormalized shrinks too. Nothing is promised then.
    router="mean"    the mean row, whose logit is the mean logit; nothing is promised.
    rows by layer    rows of one's own, as of ``mixtura.surgery.fitted_router``; nothing is promised.

Removing changes the tokens that had chosen a removed expert, and all through a softmax that is not renormalized;
nothing is promised. Every receipt says how far the logits moved, and of a removal which share of the slots it took.

D width, E experts, k chosen a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from mixtura.core.errors import NotExpressibleError, OptionError
from mixtura.core.selection import SelectionSpec
from mixtura.nn.experts.feed_forward import Experts
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.mixture import Mixture
from mixtura.nn.routers.base import Router
from mixtura.surgery.conversion import seeded
from mixtura.surgery.receipts import Before, Operated, mixture_layers
from mixtura.surgery.resize import New, resized

NEVER = -10_000.0  # a bias in logits: exp(NEVER) is 0 in every type, and NEVER itself is finite in all of them

RouterRow: TypeAlias = Literal["never", "copy", "mean"] | Mapping[int, torch.Tensor]


def add_expert(
    model: Any,
    *,
    layers: str | Sequence[int] = "all",
    copy_of: int | None = None,
    noise: float = 0.0,
    router: RouterRow | None = None,
    seed: int = 0,
    tokens_BQ: torch.Tensor | None = None,
) -> Operated:
    """Give mixtures one expert more; in a group it is the last of its form.

    Args:
        model: of the family mixtura; it must not be used afterwards.
        layers: "all" mixtures, or layers as ``upcycle`` names them.
        copy_of: expert that the new one begins as; None draws weights with mean and deviation of each stack of the
            feed-forward experts.
        noise: standard deviation of what is added to the copy, relative to that of each of its matrices.
        router: row of the new expert, see the head of the file; None is "copy" of a copy and "mean" otherwise.
        seed: of what is drawn.
        tokens_BQ: token ids that the logits are compared on; by default 2 x 64 drawn ones.

    Returns:
        The model and its receipt: ``experts`` by layer before and after, and what ``upcycle`` says.

    Raises:
        NotExpressibleError: if the model is not of the family, the router cannot have another number of experts, or
            has no bias to say never with.
        OptionError: on a value outside of these.
        MixturaError: if logits differ although that was promised.
    """
    chosen, generator = mixture_layers(model, layers), seeded(seed)
    if not isinstance(noise, (int, float)) or not 0 <= noise < float("inf"):
        raise OptionError(f"noise must be a number of at least 0, got {noise!r}")
    row = ("mean" if copy_of is None else "copy") if router is None else router
    _check_row(row, copy_of, chosen)
    before = Before(model, tokens_BQ)
    made = {i: _with_one_more(i, mixture, copy_of, noise, row, generator) for i, mixture in chosen.items()}
    preserves = all(_preserves(mixture.router.spec, row, noise) for mixture in chosen.values())  # type: ignore[arg-type]
    options = {"copy_of": copy_of, "noise": noise, "router": row if isinstance(row, str) else "given", "seed": seed}
    return _operated(model, "add-expert", options, chosen, made, before, preserves=preserves)


def remove_expert(
    model: Any,
    experts: int | Sequence[int] | Mapping[int, Sequence[int]],
    *,
    layers: str | Sequence[int] = "all",
    tokens_BQ: torch.Tensor | None = None,
) -> Operated:
    """Take experts out of mixtures, with their rows of the router; a form without experts goes too.

    Args:
        model: of the family mixtura; it must not be used afterwards.
        experts: numbers of the experts, in each of the layers; or numbers by layer, so that layers come to have
            different numbers of experts.
        layers: "all" mixtures, or layers as ``upcycle`` names them; with numbers by layer it says nothing.
        tokens_BQ: token ids that the logits are compared on; by default 2 x 64 drawn ones.

    Returns:
        The model and its receipt: ``experts`` by layer before and after, ``share_of_slots`` by layer that the removed
        experts had on the tokens, and what ``upcycle`` says.

    Raises:
        NotExpressibleError: as for ``add_expert``, and for null experts of a router.
        OptionError: if an expert does not exist, or fewer than the router needs remain.
    """
    from mixtura.hf.forward import record

    chosen = mixture_layers(model, sorted(experts) if isinstance(experts, Mapping) else layers)
    removed = {i: _numbers(i, mixture, experts) for i, mixture in chosen.items()}
    with record(model) as states:
        before = Before(model, tokens_BQ)
    made = {i: _without(i, mixture, removed[i]) for i, mixture in chosen.items()}
    indices = {int(item.layer): item.routing.indices_TK for state in states for item in state.tape.records}
    options = {"experts": {str(i): numbers for i, numbers in removed.items()}}
    operated = _operated(model, "remove-expert", options, chosen, made, before, preserves=False)
    operated.receipt["share_of_slots"] = {
        str(i): float(torch.isin(indices[i], torch.tensor(numbers, device=indices[i].device)).float().mean())
        for i, numbers in removed.items()
    }
    return operated


def _operated(
    model: Any,
    method: str,
    options: dict[str, Any],
    chosen: Mapping[int, Mixture],
    made: Mapping[int, tuple[nn.Module, nn.Module]],
    before: Before,
    *,
    preserves: bool,
) -> Operated:
    """Put new routers and experts in their places."""
    from mixtura.hf.modeling import convert

    sizes = {str(i): mixture.experts.num_experts for i, mixture in chosen.items()}
    for i, (router, experts) in made.items():
        chosen[i].router, chosen[i].experts = router, experts
    converted = convert(model, chosen)
    counts = {layer: {"before": size, "after": made[int(layer)][1].num_experts} for layer, size in sizes.items()}
    receipt = {"method": method, "options": options, "layers": sorted(chosen), "experts": counts}
    return Operated(converted, receipt | before.compare(converted, method, preserves=preserves))


def _check_row(row: RouterRow, copy_of: int | None, chosen: Mapping[int, Mixture]) -> None:
    if isinstance(row, str):
        if row not in ("never", "copy", "mean"):
            raise OptionError(f"router must be 'never', 'copy', 'mean' or rows by layer, got {row!r}")
        if row == "copy" and copy_of is None:
            raise OptionError("router 'copy' needs copy_of: the expert whose row is copied")
        return
    for i, mixture in chosen.items():
        shape = None if i not in row else tuple(row[i].shape)
        if shape != (mixture.experts.dim,):
            raise OptionError(f"router must have a row of {mixture.experts.dim} for layer {i}, got {shape}")


def _preserves(spec: SelectionSpec, row: RouterRow, noise: float) -> bool:
    """Whether every logit of the model is promised to stay."""
    if row == "never":
        return True
    alone = spec.k == 1 and spec.p is None and spec.groups == 1 and spec.norm_min == 0
    return row == "copy" and noise == 0 and alone and (spec.weighs_constantly or spec.score != "softmax")


def _with_one_more(
    layer: int, mixture: Mixture, copy_of: int | None, noise: float, row: RouterRow, generator: torch.Generator
) -> tuple[nn.Module, nn.Module]:
    forms = _forms(mixture.experts)
    f, local = _form_of(layer, forms, copy_of)
    place = sum(int(form.num_experts) for form in forms[: f + 1])  # type: ignore[arg-type]
    _check_router(layer, mixture.router, [place - 1])
    E = int(mixture.experts.num_experts)  # type: ignore[arg-type]
    router = _router_with(mixture.router, [*range(place), None, *range(place, E)], copy_of, row, layer)
    order = [*range(int(forms[f].num_experts)), None]  # type: ignore[arg-type]
    forms[f] = resized(forms[f], order, _new_weights(local, noise, generator))
    return router, _grouped(forms)


def _without(layer: int, mixture: Mixture, numbers: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    _check_router(layer, mixture.router, numbers)
    kept = [e for e in range(int(mixture.experts.num_experts)) if e not in numbers]  # type: ignore[arg-type]
    needed = 1 if mixture.router.spec.p is not None else mixture.router.slots  # type: ignore[union-attr]
    if len(kept) < int(needed):  # type: ignore[arg-type]
        raise OptionError(f"layer {layer}: {len(kept)} experts would remain, but a token chooses {needed}")
    router = resized(mixture.router, kept, _nothing_new)
    forms, first = [], 0
    for form in _forms(mixture.experts):
        E = int(form.num_experts)  # type: ignore[arg-type]
        if order := [e - first for e in kept if first <= e < first + E]:
            forms.append(form if len(order) == E else resized(form, order, _nothing_new))
        first += E
    return router, _grouped(forms)


def _forms(experts: nn.Module) -> list[nn.Module]:
    return [*experts.forms] if isinstance(experts, ExpertGroup) else [experts]


def _grouped(forms: Sequence[nn.Module]) -> nn.Module:
    return forms[0] if len(forms) == 1 else ExpertGroup(forms)


def _form_of(layer: int, forms: Sequence[nn.Module], copy_of: int | None) -> tuple[int, int | None]:
    """Number of the form that is to grow, and of the copied expert in it."""
    if copy_of is None:
        feed_forward = next((f for f, form in enumerate(forms) if isinstance(form, Experts)), None)
        if feed_forward is None:
            raise NotExpressibleError(f"layer {layer} has no feed-forward experts to draw one like; name copy_of")
        return feed_forward, None
    first = 0
    for f, form in enumerate(forms):
        if 0 <= copy_of - first < int(form.num_experts):  # type: ignore[arg-type]
            return f, copy_of - first
        first += int(form.num_experts)  # type: ignore[arg-type]
    raise OptionError(f"copy_of must be an expert of layer {layer}, 0 .. {first - 1}, got {copy_of!r}")


def _check_router(layer: int, router: nn.Module, numbers: Sequence[int]) -> None:
    """Only a router that weighs every expert by a logit of its own stays the same one with more or fewer of them."""
    if not isinstance(router, Router):
        raise NotExpressibleError(
            f"layer {layer}: {type(router).__name__} has no logits that a selection chooses by, so its choices would "
            "all change with the number of experts"
        )
    true = router.num_experts - router.spec.null_experts
    if any(number >= true for number in numbers):
        raise NotExpressibleError(
            f"layer {layer}: experts from {true} on are the router's null experts, which are fixed"
        )


def _router_with(
    router: nn.Module, order: Sequence[int | None], copy_of: int | None, row: RouterRow, layer: int
) -> nn.Module:
    if isinstance(row, Mapping):
        return resized(router, order, _new_row(None, row[layer]))
    if row != "never":
        return resized(router, order, _new_row(copy_of if row == "copy" else None))
    if "bias" not in getattr(router, "method_config", {}):
        raise NotExpressibleError(f"layer {layer}: {type(router).__name__} has no bias of its logits to say never with")
    made = resized(router, order, _new_row(copy_of), bias=True)
    with torch.no_grad():
        made.gate.bias[order.index(None)] = NEVER  # type: ignore[union-attr, operator, index]
    return made


def _new_row(source: int | None, given: torch.Tensor | None = None) -> New:
    """Part of a router's tensor for the new expert: that of another, or their mean, and a given row of the gate."""

    def new(name: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        if given is not None and name == "gate.weight":
            return given.to(parts[0])
        if source is not None:
            return parts[source]
        stack = torch.stack(parts)
        return stack.mean(0) if stack.is_floating_point() else torch.zeros_like(parts[0])

    return new


def _new_weights(source: int | None, noise: float, generator: torch.Generator) -> New:
    def new(name: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        like = parts[0]
        drawn = torch.randn(like.shape, generator=generator).to(like)
        if source is not None:
            return parts[source] + drawn * (noise * parts[source].std(correction=0)) if noise else parts[source]
        stack = torch.stack(parts)
        return stack.mean() + drawn * stack.std(correction=0)

    return new


def _nothing_new(name: str, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    raise AssertionError(f"{name}: nothing is added")


def _numbers(layer: int, mixture: Mixture, experts: int | Sequence[int] | Mapping[int, Sequence[int]]) -> list[int]:
    asked = experts[layer] if isinstance(experts, Mapping) else experts
    numbers = [asked] if isinstance(asked, int) else list(asked)
    E = mixture.experts.num_experts
    if not numbers or not all(type(number) is int and 0 <= number < E for number in numbers):  # type: ignore[operator]
        raise OptionError(f"experts must be some of the {E} of layer {layer}, 0 .. {E - 1}, got {asked!r}")  # type: ignore[operator]
    return sorted(set(numbers))
