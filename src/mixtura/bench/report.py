"""What a benchmark tells: the machine, versions, limits, and a row for each contestant of a case.

Everything is told as a dict that goes to JSON as it is:
``{kind, clock, machine, versions, quiet, limits, rows: [{case, who, value, unit, vs_best_peer, of_limit, iqr, error}],
left_out: {case: {who: why}}, foreign: {case: cores}}``.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtura.bench.measuring import QUIET, Outcome
from mixtura.core.errors import OptionError
from mixtura.core.files import write_file

OURS = "mixtura"  # names of contestants that begin so are no peers
PACKAGES = ("mixtura", "torch", "transformers", "numpy")
SMALLER = {"ms": 1e3, "s": 1.0, "GB": 1.0}  # units of what is better when it is less, in those of a timing


@dataclasses.dataclass
class Case:
    """A case that was timed.

    Attributes:
        name: such as "B/bf16/T8".
        outcome: its timings; those whose name is in ``limits`` are no contestants. Where the unit is "GB" they hold
            gigabytes in place of seconds.
        unit: one of ``SMALLER``, or what ``amount`` counts in a second.
        amount: done in a run.
        limits: names of timings to values in their unit, to be told beside.
        least: seconds that a run takes at the limits of the machine; None if nothing is known.
        errors: difference from the reference, relative.
        cosines: of the angle between outputs and the reference, where bits were taken away.
        left_out: who could not take part, and why.
        beside: contestants that do something else, so that nobody is compared with them.
    """

    name: str
    outcome: Outcome
    unit: str = "ms"
    amount: float = 1.0
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    least: float | None = None
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cosines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    beside: Sequence[str] = ()

    def rows(self) -> list[dict[str, Any]]:
        """A row for each contestant; ``vs_best_peer`` above 1 is better than the best of the others."""
        seconds = {who: timing for who, timing in self.outcome.timings.items() if who not in self.limits}
        peers = [
            timing.seconds for who, timing in seconds.items() if not who.startswith(OURS) and who not in self.beside
        ]
        rows = []
        for who, timing in seconds.items():
            factor = SMALLER.get(self.unit)
            value = timing.seconds * factor if factor else self.amount / timing.seconds
            rows.append(
                {
                    "case": self.name,
                    "who": who,
                    "value": _short(value),
                    "unit": self.unit,
                    "vs_best_peer": _short(min(peers) / timing.seconds) if peers else None,
                    "of_limit": _short(self.least / timing.seconds) if self.least else None,
                    "iqr": _short(timing.iqr),
                    "error": _short(self.errors[who]) if who in self.errors else None,
                    **({"cosine": round(self.cosines[who], 6)} if who in self.cosines else {}),
                }
            )
        return rows


class Report:
    """Collects cases.

    Args:
        kind: of the benchmark.
        threads: of the computations.
        path: JSON file that is written after each case; None for none.
        keep: whether cases that the file has already stay in it, unless they are timed anew.
        clock: that runs were timed by.

    Attributes:
        cases: so far.
        versions: of what stands here; those of peers are added.

    Raises:
        OptionError: if what is kept was timed on another machine, by another clock or with other versions.
    """

    def __init__(
        self, kind: str, threads: int, path: Path | None = None, *, keep: bool = False, clock: str = "wall"
    ) -> None:
        self.path = path
        self.versions = own_versions()
        self.cases: list[Case] = []
        self._head = {"kind": kind, "clock": clock, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}
        self._machine = machine(threads)
        self._kept: dict[str, Any] = {}
        if keep and path is not None and path.exists():
            self._kept = self._checked(json.loads(path.read_text("utf-8")))
            self.versions |= self._kept["versions"]

    def add(self, case: Case) -> list[dict[str, Any]]:
        """Its rows; the file is written anew."""
        self.cases.append(case)
        if self.path is not None:
            with write_file(self.path) as partial:
                partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")
        return case.rows()

    def to_dict(self) -> dict[str, Any]:
        """Everything so far, as the head of the file says."""
        foreign = self._with_kept("foreign", {case.name: _short(case.outcome.foreign) for case in self.cases})
        disturbed = [None if cores is None else cores >= QUIET for cores in foreign.values()]
        left_out = {case.name: {**case.left_out, **case.outcome.failed} for case in self.cases}
        rows = self._with_kept("rows", {case.name: case.rows() for case in self.cases})
        return {
            **self._head,
            "machine": self._machine,
            "versions": self.versions,
            "quiet": None if None in disturbed else not any(disturbed),
            "limits": self._with_kept(
                "limits", {case.name: {n: _short(v) for n, v in case.limits.items()} for case in self.cases}
            ),
            "rows": [row for of_case in rows.values() for row in of_case],
            "left_out": {name: out for name, out in self._with_kept("left_out", left_out).items() if out},
            "foreign": foreign,
        }

    def _with_kept(self, part: str, new: Mapping[str, Any]) -> dict[str, Any]:
        """By case, those that are kept where they stood."""
        kept = self._kept.get(part, {})
        if part == "rows":
            names = dict.fromkeys(row["case"] for row in kept)
            kept = {name: [row for row in kept if row["case"] == name] for name in names}
        return {**kept, **new}

    def _checked(self, kept: dict[str, Any]) -> dict[str, Any]:
        kept_head = {name: kept[name] for name in ("kind", "clock")}
        for theirs, mine in (
            (kept_head, self._head),
            (kept["machine"], self._machine),
            (kept["versions"], self.versions),
        ):
            for name in theirs.keys() & mine.keys():
                if theirs[name] != mine[name]:
                    raise OptionError(
                        f"{str(self.path)!r} cannot be kept: its {name} is {theirs[name]!r}, now it is {mine[name]!r}"
                    )
        return kept


def own_versions() -> dict[str, str]:
    """Of this package and of what it stands on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def machine(threads: int) -> dict[str, Any]:
    """Processor, memory and threads; what the system does not tell is left out."""
    from mixtura.nn.backends.native import instructions

    told: dict[str, Any] = {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()}
    told |= _processor()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        told["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return {**told, "threads": threads, "instructions": instructions()[0]}


def _processor() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {"processor": platform.processor()}
    facts = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
    wanted = {"model name": "processor", "cpu family": "family", "model": "model", "cache size": "cache"}
    return {name: facts[key] for key, name in wanted.items() if key in facts}


def lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Rows for people; ours are marked with >."""
    told = []
    for row in rows:
        mark = ">" if row["who"].startswith(OURS) else " "
        ratio = "" if row["vs_best_peer"] is None else f"{row['vs_best_peer']:6.2f} of the best peer"
        limit = "" if row["of_limit"] is None else f"{row['of_limit']:5.0%} of the limit"
        text = f"{mark} {row['case']:30} {row['who']:24} {row['value']:10.4g} {row['unit']:5} {ratio:24} {limit}"
        told.append(text.rstrip())
    return told


def markdown(told: Mapping[str, Any], beside: Sequence[str] = ()) -> str:
    """A table for the docs: ours, the best of transformers, the best peer, the ratio to it, and to the limit.

    Cases in which others used the machine have a star; columns in which nothing stands are left out.

    Args:
        told: a report.
        beside: contestants that do something else, with a column of their own.
    """
    head = ["case", "", "mixtura", *beside, "transformers", "best peer", "mixtura / best peer", "of the limit"]
    head.append("cosine, mixtura / best peer")
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in told["rows"]:
        cases.setdefault(row["case"], []).append(row)
    stars = {case: "*" if (told["foreign"][case] or 0) >= QUIET else "" for case in cases}
    body = [[f"`{case}`{stars[case]}", *_cells(rows, beside)] for case, rows in cases.items()]
    filled = [n for n in range(len(head)) if any(row[n] for row in body)]
    table = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row[n] for n in filled)} |" for row in table)


def _cells(rows: Sequence[Mapping[str, Any]], beside: Sequence[str]) -> list[str]:
    peers = [row for row in rows if not row["who"].startswith(OURS) and row["who"] not in beside]
    ours = next((row for row in rows if row["who"].startswith(OURS)), None)
    stock = _best(row for row in peers if row["who"].startswith("transformers") and "+" not in row["who"])
    best = _best(peers)
    ratio, limit = (ours["vs_best_peer"], ours["of_limit"]) if ours else (None, None)
    return [
        rows[0]["unit"],
        _value(ours),
        *(_value(next((row for row in rows if row["who"] == who), None)) for who in beside),
        _value(stock),
        f"{_value(best)} ({best['who']})" if best else "",
        "" if ratio is None else f"{ratio:.2f}",
        "" if limit is None else f"{limit:.0%}",
        " / ".join(f"{row['cosine']:.5f}" for row in (ours, best) if row is not None and "cosine" in row),
    ]


def _best(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    return min(rows, key=lambda row: row["value"] if row["unit"] in SMALLER else -row["value"], default=None)


def _value(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['value']:.3g}" if row["value"] < 1000 else f"{row['value']:.0f}"


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
