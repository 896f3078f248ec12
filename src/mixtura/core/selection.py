"""``select``: from logits to a routing. Scoring, choosing and normalizing in one pure function and one frozen spec.

T tokens, E experts, K slots a token, G groups of M experts. With the specs of ``mixtura.hf.families`` it reproduces
transformers' own routers bit for bit; families are data, not classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

from mixtura.core import arrays
from mixtura.core.arrays import Array
from mixtura.core.errors import OptionError, ShapeError
from mixtura.core.routing import Routing

Score = Literal["softmax", "sigmoid", "relu", "none"]
Order = Literal["score-topk", "topk-score"]
GroupScore = Literal["max", "top2-sum"]
WeightOn = Literal["output", "input"]

_SCORES: dict[str, Callable[[Array], Array]] = {
    "softmax": arrays.softmax,
    "sigmoid": arrays.sigmoid,
    "relu": arrays.relu,
    "none": lambda x: x,
}
_LOWEST = -3e38  # of no weight beside any other logit, and no NaN where all are so low


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionSpec:
    """How logits become a routing.

    Attributes:
        k: slots a token.
        p: None fills every slot; else the smallest set of experts whose probabilities sum to more than p, the other
            slots stay empty. 1 or more fills every slot. With score "softmax".
        score: function of the logits that gives the scores.
        order: "score-topk" scores all experts and keeps k of the scores; "topk-score" keeps k logits and scores those.
        renormalize: None leaves the weights; p divides them by their p-norm (1: the sum of their absolute values).
            Weights that are all 0 stay 0.
        eps: added to that norm.
        norm_min: lower bound of that norm.
        scale: factor on the weights, after renormalizing.
        groups: number of equal groups of experts, of which ``groups_kept`` are eligible; 1 is no grouping.
        groups_kept: eligible groups of a token.
        group_score: how a group is scored: its best expert, or the sum of its two best.
        group_fill: score given to the experts of other groups; -inf excludes them, 0 (DeepSeek-V2) only pushes them
            back.
        null_experts: number of experts, the last ones, that are chosen like any other and weigh 0; the norm does not
            count them (AdaMoE, MoE++).
        weight_on: "output" multiplies an expert's output, "input" its input (Llama 4). Read by the mixture, not by
            ``select``.

    Raises:
        OptionError: on a value outside of these.
    """

    k: int
    p: float | None = None
    score: Score = "softmax"
    order: Order = "score-topk"
    renormalize: float | None = None
    eps: float = 0.0
    norm_min: float = 0.0
    scale: float = 1.0
    groups: int = 1
    groups_kept: int = 1
    group_score: GroupScore = "max"
    group_fill: float = float("-inf")
    null_experts: int = 0
    weight_on: WeightOn = "output"

    def __post_init__(self) -> None:
        for name, allowed in (("score", Score), ("order", Order), ("group_score", GroupScore), ("weight_on", WeightOn)):
            _one_of(name, getattr(self, name), get_args(allowed))
        if self.k < 1:
            raise OptionError(f"k must be at least 1, got {self.k}")
        if self.p is not None and not (self.p >= 0 and self.score == "softmax"):
            raise OptionError(f"p must be None, or at least 0 with score 'softmax', got {self.p} with {self.score!r}")
        if self.renormalize is not None and self.renormalize <= 0:
            raise OptionError(f"renormalize must be None or a norm's order above 0, got {self.renormalize}")
        if not 1 <= self.groups_kept <= self.groups:
            raise OptionError(f"groups_kept must lie in 1 .. groups = {self.groups}, got {self.groups_kept}")
        if self.order == "topk-score" and self.groups > 1:
            raise OptionError("groups need order 'score-topk', got 'topk-score'")

    @property
    def weighs_constantly(self) -> bool:
        """Whether one expert is chosen and weighed the same whatever its logit is, so that no gradient passes."""
        return self.k == 1 and (self.renormalize is not None or (self.order, self.score) == ("topk-score", "softmax"))

    def check_experts(self, num_experts: int) -> None:
        """Raise ``OptionError`` unless the spec can choose among that many experts."""
        if self.k > num_experts:
            raise OptionError(f"k must be at most the number of experts {num_experts}, got {self.k}")
        if not 0 <= self.null_experts < num_experts:
            raise OptionError(f"null_experts must lie in 0 .. {num_experts - 1}, got {self.null_experts}")
        if num_experts % self.groups:
            raise OptionError(f"groups must divide the number of experts {num_experts}, got {self.groups}")
        eligible = num_experts // self.groups * self.groups_kept
        if self.group_fill == float("-inf") and self.k > eligible:
            raise OptionError(f"k must be at most the {eligible} experts of the groups kept, got {self.k}")


def select(
    logits_TE: Array,
    spec: SelectionSpec,
    bias_E: Array | None = None,
    change: Callable[[Array], Array] | None = None,
) -> Routing:
    """Choose k experts a token and weigh them.

    Args:
        logits_TE: (T, E); computed in float32 (float64 stays).
        spec: how to score, choose and normalize.
        bias_E: selection bias; it chooses, it never weighs (arXiv:2408.15664). Not with order "topk-score".
        change: from the scores (T, E) that experts are chosen by to others, after groups have been chosen; an expert
            at -inf is not chosen, and a slot that no expert is left for stays empty.

    Returns:
        A ``Routing`` with K = spec.k, slots by falling choice score, ties to the lowest index, empty ones last; weights
        in float32.

    Raises:
        OptionError: if the spec does not fit the number of experts.
        ShapeError: if logits_TE has not two dimensions or bias_E not E entries.
    """
    arrays.require_2d("logits_TE", logits_TE)
    E = logits_TE.shape[-1]
    spec.check_experts(E)
    if bias_E is not None and tuple(bias_E.shape) != (E,):
        raise ShapeError(f"bias_E must have shape ({E},), got {tuple(bias_E.shape)}")
    weights_TK, indices_TK = _choose(arrays.float32(logits_TE), spec, bias_E, change)
    if spec.p is not None and spec.p < 1:
        kept_TK = _smallest_set(weights_TK, spec.p)
        indices_TK = arrays.where(kept_TK, indices_TK, E)
        weights_TK = arrays.where(kept_TK, weights_TK, 0.0)
    if spec.null_experts:
        weights_TK = arrays.where(indices_TK < E - spec.null_experts, weights_TK, 0.0)
    return Routing(logits_TE, _normalize(weights_TK, spec), indices_TK)


def _choose(
    logits_TE: Array, spec: SelectionSpec, bias_E: Array | None, change: Callable[[Array], Array] | None
) -> tuple[Array, Array]:
    """Scores and indices of the k best of each token."""
    late = spec.order == "topk-score"
    if late and bias_E is not None:
        raise OptionError("a selection bias needs order 'score-topk', got 'topk-score'")
    score = _SCORES[spec.score]
    scores_TE = logits_TE if late else score(logits_TE)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if spec.groups > 1:
        eligible_TE = _eligible(choice_TE, spec)
        choice_TE = arrays.where(eligible_TE, choice_TE, spec.group_fill)
        if change is None:  # who is chosen in spite of the groups has the weight of its score
            scores_TE = arrays.where(eligible_TE, scores_TE, 0.0)
    if change is None:
        indices_TK = arrays.top_k(choice_TE, spec.k)
        taken_TK = arrays.take(scores_TE, indices_TK)
        return (score(taken_TK) if late else taken_TK), indices_TK
    choice_TE = change(choice_TE)
    indices_TK = arrays.top_k(choice_TE, spec.k)
    filled_TK = arrays.take(choice_TE, indices_TK) > float("-inf")
    taken_TK = arrays.take(scores_TE, indices_TK)
    if late:
        taken_TK = score(arrays.where(filled_TK, taken_TK, _LOWEST))
    return arrays.where(filled_TK, taken_TK, 0.0), arrays.where(filled_TK, indices_TK, logits_TE.shape[-1])


def _smallest_set(weights_TK: Array, p: float) -> Array:
    """Which slots come first until their sum exceeds p, the one that makes it so included."""
    beyond_TK = (weights_TK.cumsum(-1) > p) * 1
    return beyond_TK.cumsum(-1) <= beyond_TK


def _eligible(choice_TE: Array, spec: SelectionSpec) -> Array:
    """Which experts lie in the ``groups_kept`` best groups of their token."""
    E = choice_TE.shape[-1]
    choice_TGM = choice_TE.reshape(-1, spec.groups, E // spec.groups)
    best = 1 if spec.group_score == "max" else 2
    group_scores_TG = arrays.take(choice_TGM, arrays.top_k(choice_TGM, best)).sum(-1)
    kept = arrays.top_k(group_scores_TG, spec.groups_kept)
    kept_TG = arrays.scatter_rows(kept, kept * 0 + 1, spec.groups) > 0
    return arrays.repeat_last(kept_TG, E // spec.groups)


def _normalize(weights_TK: Array, spec: SelectionSpec) -> Array:
    p = spec.renormalize
    if p is not None:
        powers_T1 = (abs(weights_TK) ** p if p != 1 else abs(weights_TK)).sum(-1, keepdims=True)
        # 0 / 0 is NaN forward, and the root of 0 is NaN backward
        powers_T1 = arrays.where(powers_T1 != 0, powers_T1, 1.0)
        norm_T1 = (powers_T1 if p == 1 else powers_T1 ** (1 / p)) + spec.eps
        weights_TK = weights_TK / (norm_T1.clip(spec.norm_min) if spec.norm_min else norm_T1)
    return weights_TK * spec.scale if spec.scale != 1 else weights_TK


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
