"""Passages whose tokens are colored by their first expert, for one layer at a time.

T tokens of a passage, L layers, K slots. Without scripts the last layer is shown; with them any layer can be chosen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from mixtura.core.errors import OptionError
from mixtura.traces.trace import Trace

LENGTH = 240  # tokens of a passage
COLORS = 8


class Passage(NamedTuple):
    """One sequence of a trace.

    Attributes:
        domain: its name, "" if none.
        token_T: ids.
        expert_LTK: E for an empty slot.
        weight_LTK: gates.
    """

    domain: str
    token_T: np.ndarray
    expert_LTK: np.ndarray
    weight_LTK: np.ndarray


def passage_of(trace: Trace, sequence: int, length: int = LENGTH) -> Passage:
    """The first tokens of a sequence; of a position the last record counts.

    Raises:
        OptionError: if the trace has no token of that sequence.
    """
    rows = trace.path(sequence) if sequence in trace.sequence else trace.select(np.zeros(0, np.int64))
    rows = rows.select(rows.token >= 0)
    if not len(rows):
        known = sorted(set(trace.sequence.tolist()))
        raise OptionError(f"passage must be a sequence of the trace, one of {_short(known)}, got {sequence}")
    rows = rows.select(np.argsort(rows.call, kind="stable"))
    place = np.unique(rows.position, return_inverse=True)[1]
    rows, place = rows.select(place < length), place[place < length]
    shape = (len(trace.layers), int(place.max()) + 1, int(rows.slot.max()) + 1)
    expert_LTK = np.broadcast_to(np.asarray(trace.meta["experts"])[:, None, None], shape).copy()
    weight_LTK, token_T = np.zeros(shape, np.float32), np.zeros(shape[1], np.int64)
    expert_LTK[rows.layer, place, rows.slot] = rows.expert
    weight_LTK[rows.layer, place, rows.slot] = rows.weight
    token_T[place] = rows.token
    domain = int(rows.domain[0])
    return Passage(trace.domains[domain] if domain >= 0 else "", token_T, expert_LTK, weight_LTK)


def chosen(trace: Trace, passage: int | Sequence[int] | None) -> list[int]:
    """Sequences to show: those asked for, else the first of each domain."""
    if passage is not None:
        return [passage] if isinstance(passage, int) else list(passage)
    rows = trace.counted()
    rows = rows.select(rows.token >= 0)
    _, first = np.unique(rows.domain, return_index=True)
    return rows.sequence[np.sort(first)].tolist()


def pieces(tokenizer: Any, token_T: Sequence[int]) -> Iterator[str]:
    """Text that each token adds; a token that ends inside of a character adds "" and the next one adds the whole."""
    before = ""
    for end in range(1, len(token_T) + 1):
        text = tokenizer.decode(list(map(int, token_T[:end])), clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd") and end < len(token_T):
            yield ""
            continue
        yield text[len(before) :]
        before = text


def passages_html(trace: Trace, tokenizer: Any, sequences: Sequence[int]) -> str:
    """Legend, choice of the layer, the passages, and what the script needs to know."""
    passages = [passage_of(trace, sequence) for sequence in sequences]
    last = len(trace.layers) - 1
    options = "".join(
        f'<option value="{i}"{" selected" if i == last else ""}>{escape(name)}</option>'
        for i, name in enumerate(trace.layers)
    )
    return (
        f'<p class="needs-script"><label>Layer <select id="layer">{options}</select></label></p>'
        f'<p class="soft">Layer {escape(trace.layers[last])} at first. Background and underline tell the first expert '
        'of a token. <span class="needs-script">Tap a token for all of its experts and their weights; tap an expert to '
        "see its tokens alone.</span></p>"
        f'<input type="checkbox" id="numbers"><label for="numbers"> print the numbers of the experts</label>'
        f'<div class="passages">{_legend(max(trace.meta["experts"]))}<output id="detail"></output>'
        + "".join(_passage(number, passage, tokenizer, last, trace) for number, passage in enumerate(passages))
        + f"</div>{_routes(passages, trace)}"
    )


def css_of(expert: int) -> str:
    """Style class of an expert: eight backgrounds times four underlines."""
    return f"t x{expert % COLORS} u{expert // COLORS % 4}"


def _legend(experts: int) -> str:
    chips = (
        f'<button type="button" class="{css_of(e)}" value="{e}" aria-pressed="false">{e}</button>'
        for e in range(experts)
    )
    return f'<div class="legend" role="group" aria-label="experts">{"".join(chips)}</div>'


def _passage(number: int, passage: Passage, tokenizer: Any, layer: int, trace: Trace) -> str:
    E = int(trace.meta["experts"][layer])
    spans = []
    for i, text in enumerate(pieces(tokenizer, passage.token_T)):
        experts, weights = passage.expert_LTK[layer, i], passage.weight_LTK[layer, i]
        slots = [(int(e), float(w)) for e, w in zip(experts, weights, strict=True) if e < E]
        css, first = (css_of(slots[0][0]), slots[0][0]) if slots else ("t", "")
        tip = ", ".join(f"{e} ({w:.2f})" for e, w in slots) or "none"
        shown = escape(text).replace("\n", "↵\n") or '<span class="gap">·</span>'
        spans.append(
            f'<span class="{css}" data-at="{number} {i}" data-e="{first}" title="experts {tip}">{shown}</span>'
        )
    head = f"<h3>{escape(passage.domain)}</h3>" if passage.domain else ""
    return f'{head}<div class="passage">{"".join(spans)}</div>'


def _routes(passages: Sequence[Passage], trace: Trace) -> str:
    """Experts and weights of all layers as JSON that no text can break out of: numbers and null."""
    sizes = trace.meta["experts"]
    data = [
        {
            "experts": [[[e if e < E else None for e in slots] for slots in layer] for layer, E in _by_layer(p, sizes)],
            "weights": [[[round(w, 3) for w in slots] for slots in layer] for layer in p.weight_LTK.tolist()],
        }
        for p in passages
    ]
    text = json.dumps({"passages": data}, separators=(",", ":"))
    return f'<script type="application/json" id="routes">{text}</script>'


def _by_layer(passage: Passage, sizes: Sequence[int]) -> Iterator[tuple[list[list[int]], int]]:
    return zip(passage.expert_LTK.tolist(), sizes, strict=True)


def _short(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
