"""The table of docs/density.md, from results.json beside this file: prints it.

Usage: python benchmarks/density/table.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
PEERS = ("scikit-learn", "pomegranate")


def table(told):
    """A row for each covariance, number of columns and type; times faster than scikit-learn and than pomegranate."""
    cases = {}
    for row in told["rows"]:
        kind, d, k, dtype = row["case"].split("/")
        cases.setdefault((kind, int(d[1:]), dtype), {}).setdefault(k, {})[row["who"]] = row["value"]
    order = ["full", "tied", "diag", "spherical"]
    keys = sorted(cases, key=lambda key: (key[2] == "float32", order.index(key[0]), key[1]))
    who = ["mixtura", *(peer for peer in PEERS if any(row["who"] == peer for row in told["rows"]))]
    head = f"| family | columns | | 2 components: ms, {' / '.join(who)} | times | 16 components: ms | times |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
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
    print(table(json.loads(RESULTS.read_text("utf-8"))))
