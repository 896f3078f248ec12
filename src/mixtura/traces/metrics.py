"""What a trace says: who is busy, how evenly, and who is a specialist of what; one entry a layer.

Only real tokens count (``Trace.counted``), and only filled slots. E experts, N labels (domains, or token ids).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from mixtura.core import routing
from mixtura.core.errors import OptionError
from mixtura.traces.trace import Trace

Label = Literal["domain", "token"]


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
        by: "domain", or "token" for the token id.

    Raises:
        OptionError: for another label.
    """
    counted = trace.counted()
    return {layer: _normalized(*_pairs(counted, layer, by)) for layer in trace.layers}


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


def _normalized(label_S: np.ndarray, expert_S: np.ndarray, token_S: np.ndarray) -> float:
    names, label_S = np.unique(label_S, return_inverse=True)
    joint_NE = _joint_counts(label_S, expert_S, len(names), int(expert_S.max(initial=0)) + 1)
    entropy = routing.entropy(joint_NE.sum(1) / max(joint_NE.sum(), 1))
    return max(mutual_information(joint_NE) / entropy, 0.0) if entropy > 0 else 0.0


def _pairs(counted: Trace, layer: str, by: Label) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, expert and a number of the token for each filled slot that has a label."""
    if by not in get_args(Label):
        raise OptionError(f"by must be 'domain' or 'token', got {by!r}")
    rows = counted.of_layer(layer)
    token_S = np.cumsum(rows.slot == 0) - 1
    label_S = getattr(rows, by)
    kept_S = (label_S >= 0) & (rows.expert < counted.num_experts(layer))
    return label_S[kept_S], rows.expert[kept_S], token_S[kept_S]


def _filled(counted: Trace, layer: str) -> Trace:
    rows = counted.of_layer(layer)
    return rows.select(rows.expert < counted.num_experts(layer))


def _joint_counts(label_S: np.ndarray, expert_S: np.ndarray, labels: int, experts: int) -> np.ndarray:
    """How often each label meets each expert, (N, E)."""
    flat_S = label_S.astype(np.int64) * experts + expert_S
    return np.bincount(flat_S, minlength=labels * experts).reshape(labels, experts)
