"""A report of ``doctor`` as text for people, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from mixtura.hf.doctor import Report, RouterFacts, Row
from mixtura.hf.doctor_experts import computing_lines
from mixtura.hf.doctor_findings import ranges

WIDTH = 100
_HEAD = ("role", "layers", "tensors", "parameters", "type", "device", "frozen", "gradient")


def report_text(report: Report) -> str:
    """What was seen, then what is wrong."""
    parts = [_first(report), _table(_merged(report.rows)), "\n".join(_facts(report)), "\n".join(_found(report))]
    return "\n\n".join(part for part in parts if part)


def _first(report: Report) -> str:
    tensors, numbers = sum(len(row.tensors) for row in report.rows), sum(row.numbers for row in report.rows)
    first = f"{report.model}: {numbers:,} parameters in {tensors} tensors"
    probe = report.probe
    if probe is None:
        return first + "; no call was made"
    held = probe.largest_gradient / 1e6
    return f"{first}\n{probe.tokens} random tokens: loss {probe.loss:.3f}; gradients took {held:,.1f} MB, one at a time"


def _merged(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Rows that are alike but for their layer as one."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        gradient = "some experts" if row.gradient.startswith("experts") else row.gradient
        kind = f"{row.dtype}, quantized" if row.quantized else row.dtype
        key = (row.role, str(row.layer is None), kind, row.device, row.frozen, gradient)
        groups.setdefault(key, []).append(row)
    return [_line(key, found) for key, found in groups.items()]


def _line(key: tuple[str, ...], rows: Sequence[Row]) -> tuple[str, ...]:
    role, _, *facts = key
    layers = ranges({row.layer for row in rows if row.layer is not None}) or "-"
    tensors, numbers = sum(len(row.tensors) for row in rows), sum(row.numbers for row in rows)
    return (role, layers, f"{tensors}", f"{numbers:,}", *facts)


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as they must be; numbers to the right."""
    rows = [_HEAD, *lines]
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    text = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in (2, 3) else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        text.append(_cut("  ".join(cells).rstrip()))
    return "\n".join(text)


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def _facts(report: Report) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for facts in report.routers:
        groups.setdefault(_router(facts), []).append(facts.layer)
    for text, layers in groups.items():
        numbers = ranges(map(int, layers)) if all(layer.isdigit() for layer in layers) else ", ".join(layers)
        yield from _wrapped(f"mixtures in layer {numbers}: ", text)
    if report.backend:
        yield f"experts run on: {report.backend}"
    if report.computing is not None:
        for head, text in computing_lines(report.computing):
            yield from _wrapped(head, text)
    for names in report.tied:
        yield from _wrapped("tied: ", " = ".join(names))
    if report.stored is not None:
        yield _files(report)
    if report.export:
        able = [family for family, reason in report.export.items() if not reason]
        yield f"export: {', '.join(able) or 'no stock family can hold it; see mixtura export --check'}"


def _router(facts: RouterFacts) -> str:
    chosen = "chooses by a rule of its own" if facts.k is None else f"{facts.k} a token"
    selection = "".join(f", {name} {value}" for name, value in (facts.selection or {}).items())
    balance = {None: "", True: "; a balance loss reaches it", False: "; no balance loss reaches it"}[facts.balance]
    return f"{facts.experts} experts, {chosen}{selection}{balance}"


def _files(report: Report) -> str:
    stored = report.stored
    assert stored is not None
    wrong = {
        "missing": stored.missing,
        "without a place": stored.unexpected,
        "of another shape": stored.mismatched,
        "with other values": stored.differing,
    }
    said = ", ".join(f"{len(names)} {what}" for what, names in wrong.items() if names)
    equal = "all in the model" + ("" if report.probe is None else ", bit for bit")
    return f"files: {stored.tensors} tensors, {said or equal}"


def _found(report: Report) -> Iterator[str]:
    if not report.findings:
        yield "nothing is wrong"
    for finding in report.findings:
        yield from _wrapped(f"{finding.level}: ", finding.text)


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=head, subsequent_indent="    ", break_long_words=True, break_on_hyphens=False
    )
