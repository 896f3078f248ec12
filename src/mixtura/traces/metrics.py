"""What a trace says: who is busy, how evenly, who is a specialist of what, who works with whom; one entry a layer.

Only real tokens count (``Trace.counted``), and only filled slots. T tokens, E experts, K slots a token, N labels
(domains, token ids or positions), P positions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from mixtura.core import routing
from mixtura.core.errors import OptionError
from mixtura.traces.trace import Trace

Label = Literal["domain", "token", "position"]


class Agreement(NamedTuple):
    """How far two traces decide alike in one layer, as means over the tokens that both have.

    Attributes:
        tokens: how many these are.
        equal: share of tokens with the same set of experts.
        jaccard: experts in both sets, as a share of those in any.
        weighted: the same with weights, sum of the smaller ones over sum of the larger ones; 1 only if all are equal.
    """

    tokens: int
    equal: float
    jaccard: float
    weighted: float


class Balance(NamedTuple):
    """How evenly one layer uses its experts.

    Attributes:
        violation: max(load) / mean(load) - 1; 0 at balance.
        entropy: of the load, in nats.
        effective: exp(entropy), 1 .. E.
        idle: experts that got no slot.
    """

    violation: float
    entropy: float
    effective: float
    idle: int


def load(trace: Trace) -> dict[str, np.ndarray]:
    """Share of the filled slots that each expert got, (E,) for each layer."""
    counted = trace.counted()
    return {layer: routing.load(counted.routing(layer)) for layer in trace.layers}


def importance(trace: Trace) -> dict[str, np.ndarray]:
    """Share of the gate's weight that each expert got, (E,) for each layer (arXiv:1701.06538, eq. 6)."""
    counted = trace.counted()
    return {layer: routing.importance(counted.routing(layer)) for layer in trace.layers}


def balance(trace: Trace) -> dict[str, Balance]:
    """Violation, entropy, effective and idle experts of each layer."""
    return {
        layer: Balance(
            routing.violation(load_E),
            routing.entropy(load_E),
            routing.effective_experts(load_E),
            int((load_E == 0).sum()),
        )
        for layer, load_E in load(trace).items()
    }


def domain_load(trace: Trace) -> dict[str, np.ndarray]:
    """Share of a domain's filled slots that each expert got, (N, E) for each layer; N as ``trace.domains``."""
    counted, result = trace.counted(), {}
    for layer in trace.layers:
        rows, E = _filled(counted, layer), trace.num_experts(layer)
        count_NE = _joint_counts(rows.domain[rows.domain >= 0], rows.expert[rows.domain >= 0], len(trace.domains), E)
        result[layer] = count_NE / np.maximum(count_NE.sum(1, keepdims=True), 1)
    return result


def specialization(trace: Trace, by: Label = "domain") -> dict[str, float]:
    """How much of the label the expert tells, I(expert; label) / H(label): 0 nothing, 1 everything; 0 where H is 0.

    A plug-in estimate: with few tokens and many labels it lies above 0 even for a random router; see ``chance``.

    Args:
        trace: tokens without a label (domain -1, token -1) are left out.
        by: "domain", "token" for the token id, or "position" in the sequence.

    Raises:
        OptionError: for another label.
    """
    counted = trace.counted()
    return {layer: _normalized(*_pairs(counted, layer, by)) for layer in trace.layers}


def information(trace: Trace, by: Label = "domain") -> dict[str, float]:
    """Mutual information of expert and label in nats, not normalized; arguments as in ``specialization``."""
    counted, result = trace.counted(), {}
    for layer in trace.layers:
        label_S, expert_S, _ = _pairs(counted, layer, by)
        result[layer] = max(mutual_information(_joint(label_S, expert_S)), 0.0)
    return result


def chance(trace: Trace, by: Label = "domain", seed: int = 0) -> dict[str, float]:
    """``specialization`` of a router that knows nothing: the labels shuffled among the tokens."""
    counted, generator = trace.counted(), np.random.default_rng(seed)
    result = {}
    for layer in trace.layers:
        label_S, expert_S, token_S = _pairs(counted, layer, by)
        names, token_S = np.unique(token_S, return_inverse=True)
        label_T = np.zeros(len(names), label_S.dtype)
        label_T[token_S] = label_S
        result[layer] = _normalized(generator.permutation(label_T)[token_S], expert_S, token_S)
    return result


def mutual_information(joint_NE: np.ndarray) -> float:
    """I of two labels from their joint counts, in nats: 0 if independent, the entropy of one if the other tells it."""
    p_NE = joint_NE / max(joint_NE.sum(), 1)
    return routing.entropy(p_NE.sum(0)) + routing.entropy(p_NE.sum(1)) - routing.entropy(p_NE)


def co_activation(trace: Trace) -> dict[str, np.ndarray]:
    """Share of the tokens in which two experts work together, (E, E) for each layer; the diagonal is each by itself."""
    counted, result = trace.counted(), {}
    for layer in trace.layers:
        works_TE = _works(counted.routing(layer))
        result[layer] = works_TE.T @ works_TE / max(len(works_TE), 1)
    return result


def agreement(one: Trace, other: Trace) -> dict[str, Agreement]:
    """How far two traces decide alike: two models, precisions or engines on the same text.

    Tokens are matched by sequence and position; of each the last record counts.

    Raises:
        OptionError: if layers or numbers of experts differ, or the traces have no token in common.
    """
    if (one.layers, one.meta["experts"]) != (other.layers, other.meta["experts"]):
        raise OptionError(f"traces must have the same layers and experts, got {one.layers} and {other.layers}")
    finals = (one.final(), other.final())
    return {layer: _agreement(*(_by_place(final, layer) for final in finals)) for layer in one.layers}


def drop_rate(trace: Trace) -> dict[str, np.ndarray]:
    """Share of slots that stayed empty at each position, (P,) for each layer; NaN where there is no token.

    It tells capacities that run out along a sequence, and routers that spend less on some positions.
    """
    counted = trace.counted()
    P, result = int(counted.position.max(initial=-1)) + 1, {}
    for layer in trace.layers:
        rows, E = counted.of_layer(layer), trace.num_experts(layer)
        slots_P, empty_P = (np.bincount(r.position, minlength=P) for r in (rows, rows.select(rows.expert == E)))
        result[layer] = np.divide(empty_P, slots_P, out=np.full(P, np.nan), where=slots_P > 0)
    return result


def _works(decided: routing.Routing) -> np.ndarray:
    """Which expert works for which token, (T, E), as 0 and 1."""
    works_TE: np.ndarray = (routing.scatter_count(decided)[:, :-1] > 0).astype(np.float64)
    return works_TE


def _by_place(final: Trace, layer: str) -> tuple[np.ndarray, routing.Routing]:
    """Sequence and position of each token as one number, and the decisions."""
    rows = final.of_layer(layer)
    first = rows.slot == 0
    return rows.sequence[first].astype(np.int64) << 32 | rows.position[first], rows.routing(layer)


def _agreement(one: tuple[np.ndarray, routing.Routing], other: tuple[np.ndarray, routing.Routing]) -> Agreement:
    _, at, at_other = np.intersect1d(one[0], other[0], assume_unique=True, return_indices=True)
    if not len(at):
        raise OptionError("traces must have tokens in common, by sequence and position, got none")
    works, works_other = _works(one[1])[at], _works(other[1])[at_other]
    weights, weights_other = routing.dense(one[1])[at], routing.dense(other[1])[at_other]
    return Agreement(
        len(at),
        float((works == works_other).all(1).mean()),
        _overlap(works, works_other),
        _overlap(weights, weights_other),
    )


def _overlap(one_TE: np.ndarray, other_TE: np.ndarray) -> float:
    """Mean over tokens of the sum of smaller values over that of larger ones; 1 where both have nothing."""
    smaller_T, larger_T = np.minimum(one_TE, other_TE).sum(1), np.maximum(one_TE, other_TE).sum(1)
    return float(np.divide(smaller_T, larger_T, out=np.ones(len(one_TE)), where=larger_T > 0).mean())


def _normalized(label_S: np.ndarray, expert_S: np.ndarray, token_S: np.ndarray) -> float:
    joint_NE = _joint(label_S, expert_S)
    entropy = routing.entropy(joint_NE.sum(1) / max(joint_NE.sum(), 1))
    return max(mutual_information(joint_NE) / entropy, 0.0) if entropy > 0 else 0.0


def _pairs(counted: Trace, layer: str, by: Label) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, expert and a number of the token for each filled slot that has a label."""
    if by not in get_args(Label):
        raise OptionError(f"by must be one of {', '.join(map(repr, get_args(Label)))}, got {by!r}")
    rows = counted.of_layer(layer)
    token_S = np.cumsum(rows.slot == 0) - 1
    label_S = getattr(rows, by)
    kept_S = (label_S >= 0) & (rows.expert < counted.num_experts(layer))
    return label_S[kept_S], rows.expert[kept_S], token_S[kept_S]


def _filled(counted: Trace, layer: str) -> Trace:
    rows = counted.of_layer(layer)
    return rows.select(rows.expert < counted.num_experts(layer))


def _joint(label_S: np.ndarray, expert_S: np.ndarray) -> np.ndarray:
    names, label_S = np.unique(label_S, return_inverse=True)
    return _joint_counts(label_S, expert_S, len(names), int(expert_S.max(initial=0)) + 1)


def _joint_counts(label_S: np.ndarray, expert_S: np.ndarray, labels: int, experts: int) -> np.ndarray:
    """How often each label meets each expert, (N, E)."""
    flat_S = label_S.astype(np.int64) * experts + expert_S
    return np.bincount(flat_S, minlength=labels * experts).reshape(labels, experts)
