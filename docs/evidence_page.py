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
    return f"**{len(results)} claims**: {'; '.join(f'{count} {verdict}' for verdict, count in counts if count)}."


def _verdicts(results: list[Result]) -> str:
    rows = ((link(result.key, f"#{result.key}"), result.claim, result.verdict) for result in results)
    return table(("key", "claim", "verdict"), rows)


def _section(result: Result) -> str:
    parts = [
        f"## {result.key}",
        f"**Claim.** {result.claim} ({source(result.source)})",
        f"**Setting.** {result.setting}",
        f"**Verdict: {result.verdict}.** {result.sentence}",
        *([_figures(result), _costs(result), _differences(result), _seeds(result)] if result.arms else []),
        f"Run on {result.date}, {_machine(result)}. To repeat it:",
        f"```bash\n{result.command}\n```",
    ]
    return "\n\n".join(part for part in parts if part)


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
    rows = ((arm["name"], *(_interval(arm["figures"].get(name)) for name in names)) for arm in result.arms)
    caption = f"Mean and 95 % interval over {len(result.seeds)} seeds. Main figure: {result.figure}."
    return f"{caption}\n\n" + table(("arm", *names), rows)


def _interval(figure: Mapping[str, Any] | None) -> str:
    """Two digits of half of the interval say how many are worth showing."""
    if figure is None:
        return ""
    mean, low, high = (figure[name] for name in ("mean", "low", "high"))
    if low is None or high is None:
        return number(mean)
    half = f"{(high - low) / 2:.1e}"
    digits = min(max(1 - int(half.partition("e")[2]), 0), 8) if high > low else 3
    return f"{mean:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


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
