"""``write_report``: one HTML file that shows what a mixture does. It needs no network and follows light and dark."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mixtura.core.files import write_file
from mixtura.traces import metrics
from mixtura.traces.report_passage import chosen, passages_html
from mixtura.traces.report_results import Results, results_table, verdict
from mixtura.traces.report_svg import bars, heat_map, lines
from mixtura.traces.trace import Trace

Curves = Mapping[str, Sequence[tuple[float, float]]]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(
    path: str | Path,
    *,
    trace: Trace | None = None,
    tokenizer: Any = None,
    passage: int | Sequence[int] | None = None,
    table: Results | None = None,
    curves: Curves | None = None,
    recipe: Mapping[str, Any] | str | None = None,
    versions: Mapping[str, str] | None = None,
    notes: str | Sequence[str] = (),
    receipts: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report, whole or not at all; what is not given has no section.

    Args:
        path: HTML file to write.
        trace: decisions to show.
        tokenizer: of transformers, for passages; without it there are none.
        passage: sequences of the trace to show as text; None for the first of each domain.
        table: bits per byte by model and domain; "mixture" is compared with "dense". An entry "mean" is taken as it is.
        curves: (step, loss) by model.
        recipe: of the training, plain data or text.
        versions: of what was used, by name.
        notes: paragraphs for the end.
        receipts: of surgeries, by name; plain data.

    Raises:
        OptionError: if the models of the table have other domains than each other, or a passage is not in the trace.
    """
    seen = trace is not None and len(trace.counted()) > 0
    sections = [
        _head(trace if seen else None, table),
        _pair(_results(table), _curves(curves)),
        *(_routing(trace) if seen and trace is not None else ()),
        _passages(trace, tokenizer, passage) if seen and trace is not None and tokenizer is not None else "",
        _section("Receipts", _pairs(_flat(receipts or {})) if receipts else ""),
        _section("Recipe", f'<div class="scroll"><pre>{escape(_plain(recipe))}</pre></div>' if recipe else ""),
        _section("Versions", _pairs(versions) if versions else ""),
        _section("Notes", "".join(f"<p>{escape(n)}</p>" for n in ([notes] if isinstance(notes, str) else notes) if n)),
    ]
    with write_file(Path(path)) as partial:
        partial.write_text(_page(_title(trace), "".join(sections)), "utf-8")
    return Path(path)


def _page(title: str, body: str) -> str:
    script = f"<script>{_resource('report.js')}</script>" if 'id="routes"' in body else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_resource('report.css')}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{body}</main>{script}</body></html>\n"
    )


def _resource(name: str) -> str:
    return importlib.resources.files("mixtura.traces").joinpath(name).read_text("utf-8")


def _title(trace: Trace | None) -> str:
    name = "" if trace is None else Path(str(trace.meta.get("model", ""))).name
    return f"{name}: what the mixture does" if name else "What the mixture does"


def _section(title: str, body: str, explanation: str = "") -> str:
    soft = f'<p class="soft">{explanation}</p>' if explanation else ""
    return f"<section><h2>{escape(title)}</h2>{soft}{body}</section>" if body else ""


def _pair(*sections: str) -> str:
    return f'<div class="pair">{"".join(sections)}</div>' if all(sections) else "".join(sections)


def _head(trace: Trace | None, table: Results | None) -> str:
    said = verdict(table) if table else ""
    facts: dict[str, Any] = {}
    if trace is not None:
        counted = trace.counted()
        tokens = int(((counted.slot == 0) & (counted.layer == counted.layer.min())).sum())
        sizes = sorted(set(trace.meta["experts"]))
        facts = {
            "tokens seen": f"{tokens:,}",
            "mixture layers": len(trace.layers),
            "experts a layer": sizes[0] if len(sizes) == 1 else f"{sizes[0]}–{sizes[-1]}",
            "experts a token": int(counted.slot.max()) + 1,
            "domains": len(trace.domains),
        }
    listed = "".join(f"<li><b>{value}</b>{name}</li>" for name, value in facts.items())
    body = (f'<p class="verdict">{escape(said)}</p>' if said else "") + (
        f'<ul class="facts">{listed}</ul>' if facts else ""
    )
    return f"<section>{body}</section>" if body else ""


def _results(table: Results | None) -> str:
    explanation = "Held-out text; lower is better. The best of each row is bold with a check mark."
    if table and {"mixture", "dense"} <= set(table):
        explanation += " Δ is mixture − dense."
    return _section("Results", results_table(table) if table and any(table.values()) else "", explanation)


def _curves(curves: Curves | None) -> str:
    if not curves or not any(curves.values()):
        return ""
    drawn = lines(curves, title=f"Training loss by step: {', '.join(curves)}", x="step", y="loss (nats a token)")
    return _section("Training", f"<figure>{drawn}</figure>")


def _routing(trace: Trace) -> Iterator[str]:
    """Sections that read the trace alone."""
    yield _section(
        "Load",
        _heat(
            _ragged(metrics.load(trace).values(), trace),
            trace.layers,
            "Load by layer and expert, as a multiple of an equal share",
            "layer",
        ),
        "Slots that an expert got, as a multiple of an equal share: 1 is balance, × is an expert that no token chose.",
    )
    yield _section("Balance and specialization", f'<div class="grid">{"".join(_figures(trace))}</div>')
    if trace.domains:
        explanation = "Each row is one domain: how its tokens spread over the experts, as a multiple of an equal share."
        yield _section("Domains and experts", "".join(_domain_maps(trace)), explanation)


def _heat(values_RC: np.ndarray, rows: Sequence[str], title: str, y: str, top: float | None = None) -> str:
    columns = [str(e) for e in range(values_RC.shape[1])]
    svg = heat_map(values_RC, rows, columns, title=title, x="expert", y=y, top=top)
    return f'<figure><div class="scroll" tabindex="0" role="group" aria-label="{escape(title)}">{svg}</div></figure>'


def _ragged(shares: Any, trace: Trace) -> np.ndarray:
    """Shares times E, one row a layer; NaN where a layer has fewer experts."""
    table = np.full((len(trace.layers), max(trace.meta["experts"])), np.nan)
    for row, share_E in zip(table, shares, strict=True):
        row[: len(share_E)] = share_E * len(share_E)
    return table


def _figures(trace: Trace) -> Iterator[str]:
    """Bars by layer."""
    balance = metrics.balance(trace)
    sizes = dict(zip(trace.layers, map(float, trace.meta["experts"]), strict=True))
    effective = {layer: figures.effective for layer, figures in balance.items()}
    violation = {layer: figures.violation for layer, figures in balance.items()}
    idle = sum(figures.idle for figures in balance.values())
    text = f"exp(entropy) of the load; stroke: all that there are. Idle in all layers: {idle}."
    yield _bars("Effective experts", effective, "experts", text, sizes)
    yield _bars("Maximal violation of balance", violation, "max / mean − 1", "0 is perfect balance.", top=1.0)
    labels: dict[metrics.Label, str] = {"domain": "domain", "token": "token id", "position": "position"}
    for by, what in labels.items():
        if len(trace.domains) > 1 or by != "domain":
            values = metrics.specialization(trace, by)
            text = f"Share of the {what} that the expert tells, I / H. Stroke: the same with shuffled labels."
            yield _bars(f"Specialization by {what}", values, "share", text, metrics.chance(trace, by))


def _bars(
    title: str,
    values: Mapping[str, float],
    y: str,
    text: str,
    marks: Mapping[str, float] | None = None,
    top: float | None = None,
) -> str:
    mean = sum(values.values()) / max(len(values), 1)
    drawn = bars(values, title=f"{title} by layer, mean {mean:.3f}", x="layer", y=y, marks=marks, top=top)
    return f"<figure><h3>{escape(title)}</h3>{drawn}<figcaption>{escape(text)} Mean {mean:.3f}.</figcaption></figure>"


def _domain_maps(trace: Trace) -> Iterator[str]:
    """A heat map for each layer, the last one open; all on one scale."""
    maps = {layer: share_NE * share_NE.shape[1] for layer, share_NE in metrics.domain_load(trace).items()}
    top = max(float(values.max(initial=0)) for values in maps.values())
    for layer, values_NE in maps.items():
        opened = " open" if layer == trace.layers[-1] else ""
        title = f"Load by domain and expert in layer {layer}, as a multiple of an equal share"
        drawn = _heat(values_NE, trace.domains, title, "domain", top)
        yield f"<details{opened}><summary>Layer {escape(layer)}</summary>{drawn}</details>"


def _passages(trace: Trace, tokenizer: Any, passage: int | Sequence[int] | None) -> str:
    sequences = chosen(trace, passage)
    return _section("Text", passages_html(trace, tokenizer, sequences) if sequences else "")


def _pairs(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(text)}</td></tr>'
        for name, text in ((n, v if isinstance(v, str) else json.dumps(v)) for n, v in values.items())
    )
    return f'<div class="scroll"><table class="plain">{rows}</table></div>'


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return flat


def _plain(recipe: Mapping[str, Any] | str) -> str:
    return recipe if isinstance(recipe, str) else yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
