"""The page of evidence: a table of verdicts, then every claim with its arms, costs, seeds and command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from markdown_table import link, table

from mixtura.evidence import VERDICTS, Result

NOTHING = "No claim has been tested yet."


def evidence_page(results: Mapping[str, Result]) -> str:
    """Markdown of all results, by key."""
    if not results:
        return NOTHING
    told = [results[key] for key in sorted(results)]
    return "\n\n".join([_counts(told), _verdicts(told), *(_section(result) for result in told)])


def _counts(results: list[Result]) -> str:
    counts = ((verdict, sum(result.verdict == verdict for result in results)) for verdict in VERDICTS)
    return f"**{len(results)} claims**: {', '.join(f'{verdict} {count}' for verdict, count in counts if count)}."


def _verdicts(results: list[Result]) -> str:
    rows = ((link(result.key, f"#{result.key}"), sentence(result.claim), result.verdict) for result in results)
    return table(("key", "claim", "verdict"), rows)


def _section(result: Result) -> str:
    parts = [
        f"## {result.key}",
        f"**Claim.** {sentence(result.claim)} Source: {sentence(source(result.source))}",
        f"**Setting.** {sentence(result.setting)}",
        f"**Verdict: {result.verdict}.** {sentence(result.sentence)}",
        *([_figures(result), _costs(result), _differences(result), _seeds(result)] if result.arms else []),
        f"Run on {result.date}, {_machine(result)}. To repeat it:",
        f"```bash\n{result.command}\n```",
    ]
    return "\n\n".join(part for part in parts if part)


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


def source(text: str) -> str:
    """A source whose arXiv ids are links."""
    return re.sub(r"arXiv:([\d.]+\d)", r"[\g<0>](https://arxiv.org/abs/\1)", text)


def _machine(result: Result) -> str:
    machine = ", ".join(f"{value} {name}" if name == "cores" else str(value) for name, value in result.machine.items())
    return f"{machine}; {', '.join(f'{name} {version}' for name, version in result.versions.items())}"


def _columns(arms: Iterable[Mapping[str, Any]], part: str) -> list[str]:
    return list(dict.fromkeys(name for arm in arms for name in arm[part]))


def _figures(result: Result) -> str:
    names = _columns(result.arms, "figures")
    rows = ((arm["name"], *(_margin(arm["figures"].get(name)) for name in names)) for arm in result.arms)
    caption = f"Mean and half of its 95 % interval over {len(result.seeds)} seeds. Main figure: {result.figure}."
    return f"{caption}\n\n" + table(("arm", *names), rows)


def _margin(figure: Mapping[str, Any] | None) -> str:
    """Mean and half of the interval, which is symmetric."""
    if figure is None or figure["low"] is None:
        return number(figure and figure["mean"])
    digits = _digits(figure)
    return f"{figure['mean']:,.{digits}f}\u00a0±\u00a0{(figure['high'] - figure['low']) / 2:,.{digits}f}"


def _interval(figure: Mapping[str, Any]) -> str:
    mean, low, high = (f"{figure[name]:,.{_digits(figure)}f}" for name in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def _digits(figure: Mapping[str, Any]) -> int:
    """Two digits of half of the interval are worth showing."""
    half = (figure["high"] - figure["low"]) / 2
    return min(max(1 - int(f"{half:.1e}".partition("e")[2]), 0), 8) if half else 3


def _costs(result: Result) -> str:
    names = _columns(result.arms, "cost")
    rows = ((arm["name"], *(number(arm["cost"].get(name)) for name in names)) for arm in result.arms)
    return "Mean cost of a run:\n\n" + table(("arm", *names), rows) if names else ""


def number(value: float | None) -> str:
    """Four digits, or all of a whole number below a billion; nothing where there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}".replace("e+", "e")


def _differences(result: Result) -> str:
    rows = ((f"{row['of']} minus {row['against']}", row["figure"], _interval(row)) for row in result.differences)
    return table(("difference, paired by seed", "figure", "mean (95 % interval)"), rows) if result.differences else ""


def _seeds(result: Result) -> str:
    rows = (
        (arm["name"], name, *(number(value) for value in figure["seeds"]))
        for arm in result.arms
        for name, figure in arm["figures"].items()
    )
    seeds = table(("arm", "figure", *(f"seed {seed}" for seed in result.seeds)), rows)
    settings = "\n".join(f"* {arm['name']}: {_setting(arm)}" for arm in result.arms)
    return _folded("Every seed, and how the arms were set", f"{seeds}\n\n{settings}")


def _setting(arm: Mapping[str, Any]) -> str:
    tuned = f", best of {len(arm['tuned'])} settings on a seed of its own" if arm["tuned"] else ""
    return f"`{json.dumps(arm['config'], ensure_ascii=False)}`{tuned}"


def _folded(title: str, text: str) -> str:
    return f'??? note "{title}"\n\n' + "\n".join(f"    {line}" if line else "" for line in text.splitlines())
