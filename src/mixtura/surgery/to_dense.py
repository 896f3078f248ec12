"""``to_dense``: mixtures of ours become dense feed-forward layers again, the inverse of upcycling.

One dense layer for a mixture of E experts is a mean over copies c of their shards, which lie side by side:

    f(x) = sum_c a_c f_c(x) in weights,  sum_c a_c = 1;   f_c = shards c G .. c G + G - 1, each with 1 / G

G = 1 is an expert itself. If all copies are equal and weights sum to 1, as upcycling leaves them, the mixture computes
just that, and the weights of the old dense layer come back bit for bit (a mean is taken as the first plus the mean of
differences, which are 0; 1 / G is exact for G a power of two). Otherwise it is an approximation, and the receipt says
how far it is off. An expert that every token passes is put beside, exactly: its hidden units come first. A scale of the
router's weights goes into the down projection.

When no mixture is left the model is one of its base family again, stock. Its feed-forwards then need one width; as long
as mixtures are left, or some layers were dense from the start, that is the width of the base.

D width, F width of a feed-forward, E experts, G shards of a copy, C copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch

from mixtura.core.errors import NotExpressibleError, OptionError
from mixtura.nn.dense import FeedForwardWeights
from mixtura.nn.experts.feed_forward import Experts, view_expert
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.mixture import FeedForward, Mixture
from mixtura.surgery.conversion import check_whole
from mixtura.surgery.receipts import Before, Operated, mixture_layers

Choice: TypeAlias = Literal["mean"] | int | Sequence[float]


def to_dense(
    model: Any,
    *,
    layers: str | Sequence[int] = "all",
    experts: Choice | Mapping[int, Choice] = "mean",
    shards: int = 1,
    tokens_BQ: torch.Tensor | None = None,
) -> Operated:
    """Turn mixtures into dense feed-forward layers.

    Args:
        model: of the family mixtura; it must not be used afterwards.
        layers: "all" mixtures, or layers as ``upcycle`` names them.
        experts: the number of one copy, "mean" of all, or a share for each (its load, say); or one of these by layer.
        shards: G, as it was given to ``upcycle``; 1 for experts that are whole.
        tokens_BQ: token ids that the logits are compared on; by default 2 x 64 drawn ones.

    Returns:
        The model, of its base family if no mixture is left, and its receipt: ``width`` of the new layers,
        ``model_type``, and what ``upcycle`` says.

    Raises:
        NotExpressibleError: if an expert is no feed-forward, or the base family cannot hold the dense layer.
        OptionError: on a value outside of these.
        MixturaError: if logits differ although copies are equal and weights sum to 1.
    """
    check_whole("shards", shards)
    chosen = mixture_layers(model, layers)
    dense = {}
    for i, mixture in chosen.items():
        choice = experts.get(i) if isinstance(experts, Mapping) else experts
        dense[i] = merged(i, mixture, choice, shards)
    before = Before(model, tokens_BQ)
    preserves = all(_preserves(mixture, shards) for mixture in chosen.values())

    from mixtura.hf.dense import put_dense

    made = put_dense(model, dense)
    receipt = {
        "method": "to-dense",
        "options": {"experts": _plain(experts), "shards": shards},
        "layers": sorted(chosen),
        "width": {str(i): weights.width for i, weights in dense.items()},
        "model_type": made.config.model_type,
    }
    return Operated(made, receipt | before.compare(made, "to-dense", preserves=preserves))


@torch.no_grad()
def merged(layer: int, mixture: Mixture, choice: Choice | None, shards: int = 1) -> FeedForwardWeights:
    """One dense layer for a mixture, with weights of its own.

    Args:
        layer: its number, for errors.
        mixture: of feed-forward experts.
        choice: the number of one copy, "mean", or a share for each copy.
        shards: G.

    Raises:
        NotExpressibleError: if there are other forms, or the shared expert is another than they are.
        OptionError: if the choice does not fit.
    """
    experts = mixture.experts
    if type(experts) is not Experts:
        what = "experts of several forms" if isinstance(experts, ExpertGroup) else type(experts).__name__
        raise NotExpressibleError(f"layer {layer} has {what}, and a dense layer holds feed-forward experts")
    if experts.num_experts % shards:
        raise OptionError(f"shards must divide the {experts.num_experts} experts of layer {layer}, got {shards}")
    copies = [_copy(experts, c, shards) for c in range(experts.num_experts // shards)]
    routed = _mean(copies, _shares(layer, choice, len(copies)))
    spec = mixture.router.spec
    scale = spec.scale if spec is not None else 1.0  # type: ignore[union-attr]
    routed = routed._replace(down_DF=routed.down_DF * scale, down_bias_D=_times(routed.down_bias_D, scale))
    return routed if mixture.shared is None else _beside(layer, mixture.shared, routed)


def _copy(experts: Experts, c: int, shards: int) -> FeedForwardWeights:
    """The shards of one copy side by side; each counts with 1 / G, as does its output bias."""
    views = [view_expert(experts, e) for e in range(c * shards, (c + 1) * shards)]
    gates, ups, downs, gate_biases, up_biases, down_biases = zip(*views, strict=True)
    return FeedForwardWeights(
        _joined(gates, 0),
        torch.cat(ups),
        torch.cat(downs, 1) / shards,
        _joined(gate_biases, 0),
        _joined(up_biases, 0),
        None if down_biases[0] is None else _about_first(down_biases, [1 / shards] * shards),
        experts.method_config["activation"],
    )


def _joined(parts: Sequence[torch.Tensor | None], axis: int) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there, axis) if there else None


def _about_first(parts: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """Weighted mean, bit for bit what the parts are if all are equal."""
    made = parts[0].clone()
    for part, share in zip(parts, shares, strict=True):
        made += (part - parts[0]) * share
    return made


def _mean(copies: Sequence[FeedForwardWeights], shares: Sequence[float] | int) -> FeedForwardWeights:
    if isinstance(shares, int):
        return copies[shares]
    columns = list(zip(*(copy[:6] for copy in copies), strict=True))
    means = [None if parts[0] is None else _about_first(parts, shares) for parts in columns]
    return FeedForwardWeights(*means, copies[0].activation)  # type: ignore[arg-type]


def _shares(layer: int, choice: Choice | None, copies: int) -> Sequence[float] | int:
    if choice == "mean":
        return [1 / copies] * copies
    if type(choice) is int and 0 <= choice < copies:
        return choice
    if isinstance(choice, Sequence) and not isinstance(choice, str) and len(choice) == copies:
        total = sum(choice)
        if min(choice) >= 0 and 0 < total < float("inf"):
            return [share / total for share in choice]
    raise OptionError(
        f"experts of layer {layer} must be 'mean', a number in 0 .. {copies - 1}, or {copies} shares of at least 0, "
        f"got {choice!r}"
    )


def _times(bias_D: torch.Tensor | None, scale: float) -> torch.Tensor | None:
    return None if bias_D is None else bias_D * scale


def _beside(layer: int, shared: FeedForward, routed: FeedForwardWeights) -> FeedForwardWeights:
    """Both as one wider layer; the hidden units of the shared expert come first."""
    options = shared.config
    gated = routed.gate_FD is not None
    if (options["gated"], options["activation"]) != (gated, routed.activation):
        raise NotExpressibleError(f"layer {layer}: the shared expert is of another form than the experts")
    gate, up, down = shared.gate_proj, shared.up_proj, shared.down_proj
    return FeedForwardWeights(
        None if gate is None or routed.gate_FD is None else torch.cat([gate.weight, routed.gate_FD]),
        torch.cat([up.weight, routed.up_FD]),
        torch.cat([down.weight, routed.down_DF], 1),
        None if gate is None else _biases(gate.bias, routed.gate_bias_F, gate.weight, routed.up_FD),
        _biases(up.bias, routed.up_bias_F, up.weight, routed.up_FD),
        _sum(down.bias, routed.down_bias_D),
        routed.activation,
    )


def _biases(
    first: torch.Tensor | None, second: torch.Tensor | None, first_FD: torch.Tensor, second_FD: torch.Tensor
) -> torch.Tensor | None:
    """Biases one after the other; none counts as 0 beside one that is there."""
    if first is None and second is None:
        return None
    parts = zip((first, second), (first_FD, second_FD), strict=True)
    return torch.cat([like.new_zeros(len(like)) if bias is None else bias for bias, like in parts])


def _sum(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    return second if first is None else first if second is None else first + second


def _preserves(mixture: Mixture, shards: int) -> bool:
    """Whether the copies are equal, chosen whole, and their weights sum to 1 before the scale."""
    experts, spec = mixture.experts, mixture.router.spec
    if spec is None or spec.weight_on != "output" or spec.null_experts:  # type: ignore[union-attr]
        return False
    divided = spec.renormalize == 1 and spec.eps == 0 and spec.norm_min == 0 and spec.score in ("softmax", "sigmoid")  # type: ignore[union-attr]
    chosen = (spec.order, spec.score, spec.renormalize, spec.p) == ("topk-score", "softmax", None, None)  # type: ignore[union-attr]
    if not (divided or chosen):
        return False
    copies = [_copy(experts, c, shards) for c in range(experts.num_experts // shards)]  # type: ignore[arg-type, operator]
    equal = all(
        ours is None or torch.equal(ours, first)
        for copy in copies
        for ours, first in zip(copy[:6], copies[0][:6], strict=True)
    )
    return equal and (shards == 1 or _tied(mixture, shards))


def _tied(mixture: Mixture, shards: int) -> bool:
    """Whether the rows of the gate are equal within each copy, so that whole copies are chosen."""
    rows_ED = getattr(mixture.router.gate, "weight", None)
    if rows_ED is None or mixture.router.slots % shards:  # type: ignore[operator]
        return False
    rows_CGD = rows_ED.detach().unflatten(0, (-1, shards))
    return bool((rows_CGD == rows_CGD[:, :1]).all())


def _plain(experts: Choice | Mapping[int, Choice]) -> Any:
    if isinstance(experts, Mapping):
        return {str(i): _plain(choice) for i, choice in experts.items()}
    return experts if isinstance(experts, (str, int)) else [float(share) for share in experts]
