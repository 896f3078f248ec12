"""The table of results and the sentence that says who is better. Bits per byte: lower is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from mixtura.core.errors import OptionError

Results = Mapping[str, Mapping[str, float]]
MEAN = "mean"


def domains_of(table: Results) -> list[str]:
    """Domains of the table, in order, without the mean.

    Raises:
        OptionError: if the models were not measured on the same domains.
    """
    names = [[domain for domain in row if domain != MEAN] for row in table.values()]
    if any(set(other) != set(names[0]) for other in names):
        raise OptionError(f"table must have the same domains for every model, got {names}")
    return names[0]


def mean_of(row: Mapping[str, float]) -> float:
    """The mean that is given, else the mean over the domains."""
    values = [value for domain, value in row.items() if domain != MEAN]
    return row[MEAN] if MEAN in row else sum(values) / max(len(values), 1)


def verdict(table: Results, one: str = "mixture", other: str = "dense") -> str:
    """Whether ``one`` is better than ``other``, by how much and in how many domains; "" if one is not there."""
    if one not in table or other not in table:
        return ""
    domains = domains_of(table)
    mine, theirs = mean_of(table[one]), mean_of(table[other])
    if not (math.isfinite(mine) and math.isfinite(theirs)):
        return f"The {one} and the {other} model cannot be compared: a mean is not finite."
    gain = difference(mine, theirs)
    better = sum(difference(table[one][domain], table[other][domain]) < 0 for domain in domains)
    if gain == 0:
        head = f"The {one} is as good as the {other} model"
    else:
        word = "better" if gain < 0 else "worse"
        head = f"The {one} is {word} than the {other} model by {abs(gain):.4f} bits per byte ({abs(gain / theirs):.2%})"
    base = f" The untouched base has {mean_of(table['base']):.4f}." if "base" in table else ""
    return f"{head}: {mine:.4f} against {theirs:.4f} on average; better in {better} of {len(domains)} domains.{base}"


def difference(one: float, other: float) -> float:
    """one - other of the numbers as they are printed, so that a reader who subtracts gets the same."""
    return round(round(one, 4) - round(other, 4), 4)


def results_table(table: Results, one: str = "mixture", other: str = "dense") -> str:
    """HTML table: a row for each domain, a column for each model, the best of a row marked, and one minus other."""
    models, compared = list(table), one in table and other in table
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in models)
    head += f'<th scope="col"><abbr title="{escape(one)} − {escape(other)}">Δ</abbr></th>' if compared else ""
    rows = [(domain, {name: table[name][domain] for name in models}, "") for domain in domains_of(table)]
    rows.append((MEAN, {name: mean_of(table[name]) for name in models}, ' class="mean"'))
    body = "".join(
        f'<tr{css}><th scope="row">{escape(domain)}</th>{_values(values)}'
        + (f"<td>{_signed(difference(values[one], values[other]))}</td>" if compared else "")
        + "</tr>"
        for domain, values, css in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">bits per byte</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _values(values: Mapping[str, float]) -> str:
    best = min(round(value, 4) for value in values.values())
    return "".join(
        f'<td class="best">{value:.4f}<span> ✓</span></td>' if round(value, 4) == best else f"<td>{value:.4f}</td>"
        for value in values.values()
    )


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")
