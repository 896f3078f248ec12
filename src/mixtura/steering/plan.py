"""What is changed in the decisions of one layer, and the decision that comes out.

T tokens, E experts, K slots a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from mixtura.core.arrays import top_k
from mixtura.core.errors import NotExpressibleError, OptionError
from mixtura.core.routing import Routing
from mixtura.core.selection import SelectionSpec
from mixtura.hf.selection import LayerSelection
from mixtura.nn.state import RouterState

NEVER, ALWAYS = float("-inf"), float("inf")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Changes of one layer.

    Attributes:
        k: experts a token; None for as many as the layer has.
        ranks: places in the order of choice, 0 the best, that are taken instead of the first ones.
        bias: added to the score that an expert is chosen by.
        off: experts that are never chosen.
        force: experts that are always chosen.
    """

    k: int | None = None
    ranks: tuple[int, ...] | None = None
    bias: tuple[tuple[int, float], ...] = ()
    off: frozenset[int] = frozenset()
    force: frozenset[int] = frozenset()

    def then(self, inner: Plan) -> Plan:
        """Both: k and ranks of the inner one count if it has any, biases add up, the rest is joined."""
        counted = inner if inner.k is not None or inner.ranks is not None else self
        return Plan(counted.k, counted.ranks, self.bias + inner.bias, self.off | inner.off, self.force | inner.force)

    def check(self, selection: LayerSelection) -> None:
        """Raise unless the layer can be changed so.

        Raises:
            OptionError: for experts that the layer has not, or changes that exclude each other.
            NotExpressibleError: if the layer does not select from logits by a spec.
        """
        where, E = f"layer {selection.layer}", selection.num_experts
        for name, experts in (("bias", [e for e, _ in self.bias]), ("off", self.off), ("force", self.force)):
            for expert in sorted(experts):
                if not 0 <= expert < E:
                    raise OptionError(f"{where}: {name} must be of the experts 0 .. {E - 1}, got {expert}")
        if both := sorted(self.off & self.force):
            raise OptionError(f"{where}: expert {both[0]} cannot be in off and in force")
        if self.off and len(self.off) == E:
            raise OptionError(f"{where}: off must leave one of the E = {E} experts")
        if self._names:
            self._check_selection(where, E, selection.require(", ".join(self._names)))
        elif self.off and selection.spec is None:
            raise NotExpressibleError(f"{where}: off needs to know how weights are normalized, but {selection.refusal}")

    def _check_selection(self, where: str, E: int, spec: SelectionSpec) -> None:
        left = E - len(self.off)
        if self.ranks is not None:
            if self.k is not None or self.force:
                raise OptionError(f"{where}: ranks cannot go with {'k' if self.k is not None else 'force'}")
            if not self.ranks or len(set(self.ranks)) < len(self.ranks) or not all(0 <= r < left for r in self.ranks):
                raise OptionError(
                    f"{where}: ranks must be different ones of 0 .. {left - 1} (E = {E}), got {list(self.ranks)}"
                )
        if self.k is not None and not 1 <= self.k <= left:
            raise OptionError(
                f"{where}: k must lie in 1 .. {left}, the experts of E = {E} that are not off, got {self.k}"
            )
        k = self.slots(spec)
        if len(self.force) > k:
            raise OptionError(f"{where}: force must name at most k = {k} experts, got {len(self.force)} of E = {E}")
        if spec.p is not None and spec.p < 1 and (self.ranks is not None or self.force):
            raise NotExpressibleError(
                f"{where}: {self._names[0]} needs a router that fills all slots; its own stop at probability {spec.p}"
            )
        try:
            dataclasses.replace(spec, k=k).check_experts(E)
        except OptionError as error:
            raise OptionError(f"{where}: {error}") from None

    @property
    def _names(self) -> list[str]:
        asked = {"k": self.k is not None, "ranks": self.ranks is not None, "bias": self.bias, "force": self.force}
        return [name for name, value in asked.items() if value]

    def slots(self, spec: SelectionSpec) -> int:
        """K of the changed decision."""
        return len(self.ranks) if self.ranks is not None else spec.k if self.k is None else self.k

    def changes(self, selection: LayerSelection) -> bool:
        """Whether anything is asked for that the layer does not do anyway."""
        same_k = self.k is None or (selection.spec is not None and self.k == selection.spec.k)
        return not (same_k and self.ranks is None and not self.bias and not self.off and not self.force)

    def decide(self, selection: LayerSelection, state: RouterState, routing: Routing) -> Routing:
        """The changed decision of a layer."""
        if selection.refusal or selection.spec is None:
            return _masked(routing, self.off, selection)
        bias_E = routing.logits_TE.new_zeros(selection.num_experts, dtype=torch.float32) if self.bias else None
        for expert, value in self.bias:
            bias_E[expert] += value  # type: ignore[index]
        k = self.slots(selection.spec)
        changed = self.off or self.force or self.ranks is not None
        return selection.again(routing, state, k=k, bias_E=bias_E, change=self._change(k) if changed else None)

    def _change(self, k: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(choice_TE: torch.Tensor) -> torch.Tensor:
            choice_TE = choice_TE.clone()
            choice_TE[:, sorted(self.off)] = NEVER
            if self.ranks is not None:
                return _only(choice_TE, top_k(choice_TE, max(self.ranks) + 1)[:, list(self.ranks)])
            if not self.force:
                return choice_TE
            forced = sorted(self.force)
            choice_TE[:, forced] = choice_TE[:, forced].clamp(min=torch.finfo(choice_TE.dtype).min)
            raised_TE = choice_TE.clone()
            raised_TE[:, forced] = ALWAYS
            chosen_TK = top_k(raised_TE, k)
            kept_TE = torch.zeros_like(choice_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
            return choice_TE.masked_fill(~kept_TE, NEVER)  # in the order in which they would have been chosen

        return change


def _only(choice_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """Scores by which the experts given are chosen, in their order; who had no chance has none."""
    K = indices_TK.shape[1]
    places_TK = torch.arange(K, 0, -1, device=choice_TE.device, dtype=choice_TE.dtype).expand_as(indices_TK)
    places_TK = places_TK.masked_fill(choice_TE.gather(1, indices_TK) == NEVER, NEVER)
    return torch.full_like(choice_TE, NEVER).scatter(1, indices_TK, places_TK)


def _masked(routing: Routing, off: frozenset[int], selection: LayerSelection) -> Routing:
    """The decision without some experts; if the spec normalizes, the others get their weight."""
    logits_TE, weights_TK, indices_TK = routing
    off_E1 = torch.zeros(selection.num_experts + 1, dtype=torch.bool, device=indices_TK.device)
    off_E1[sorted(off)] = True
    gone_TK = off_E1[indices_TK.long()]
    left_TK = weights_TK.masked_fill(gone_TK, 0)
    spec = selection.spec
    p = 1.0 if spec is not None and spec.order == "topk-score" and spec.score == "softmax" else None
    p = spec.renormalize if spec is not None and spec.renormalize is not None else p
    if p is not None:
        before_T1, after_T1 = (w.abs().pow(p).sum(-1, keepdim=True).pow(1 / p) for w in (weights_TK, left_TK))
        factor_T1 = torch.where(gone_TK.any(-1, keepdim=True) & (after_T1 > 0), before_T1 / after_T1, 1.0)
        left_TK = left_TK * factor_T1.to(left_TK.dtype)
    return Routing(logits_TE, left_TK, indices_TK.masked_fill(gone_TK, selection.num_experts))
