"""The tables of docs/density.md, from results.json beside this file: prints them.

Usage: python benchmarks/density/table.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
FAMILIES = ("full", "tied", "diag", "spherical")
PEERS = ("scikit-learn", "pomegranate")


def table(told, dtype):
    """A row for each covariance and number of columns; times faster than scikit-learn and than pomegranate."""
    cases = {}
    for row in told["rows"]:
        kind, d, k, kept = row["case"].split("/")
        if kept == dtype:
            cases.setdefault((kind, int(d[1:])), {}).setdefault(k, {})[row["who"]] = row["value"]
    keys = sorted(cases, key=lambda key: (FAMILIES.index(key[0]), key[1]))
    who = ["mixtura", *(peer for peer in PEERS if any(row["who"] == peer for row in told["rows"]))]
    head = f"| {dtype} | columns | 2 components: ms, {' / '.join(who)} | times | 16 components: ms | times |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {' | '.join(map(str, key))} | {_cell(cases[key], 'k2', who)} | {_cell(cases[key], 'k16', who)} |"
        for key in keys
    ]
    return "\n".join(lines)


def _cell(case, k, who):
    found = case.get(k)
    if not found:
        return " | "
    ours, *others = (found.get(name) for name in who)
    times = " / ".join("-" if other is None else f"{other / ours:.1f}" for other in others)
    return f"{' / '.join('-' if value is None else f'{value:.3g}' for value in (ours, *others))} | {times}"


if __name__ == "__main__":
    told = json.loads(RESULTS.read_text("utf-8"))
    print(table(told, "float64"), table(told, "float32"), sep="\n\n")
