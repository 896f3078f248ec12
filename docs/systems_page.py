"""The page of systems: what every published system of ``systems.json`` is, and how much of it is here.

A row says what a system is and where it was published. How it stands is computed: from the table of methods, from the
public names under ``at``, and from the results of evidence.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from markdown_table import link, table

from mixtura.core import registry
from mixtura.core.errors import OptionError
from mixtura.evidence import Result

FILE = Path(__file__).with_name("systems.json")
FAMILIES = {
    "routing": "Routing",
    "experts": "Forms of experts",
    "depth": "Mixtures of depths",
    "attention": "Attention",
    "adapters": "Mixtures of adapters",
    "convert": "Dense models into mixtures",
    "compress": "Fewer and smaller experts",
    "steer": "Steering trained models",
    "serve": "Serving",
    "distributed": "Many devices",
    "data": "Mixtures of data",
    "diversity": "Diversity",
    "density": "Mixture densities",
    "modality": "Modalities",
    "tasks": "Tasks, tables, streams and graphs",
    "agents": "Mixtures of models and agents",
}
BESIDE = "Methods that are a part of a system above or have no paper, and claims of their own."
SCOPES = {"full": "planned", "recipe": "planned, as a recipe", "reference": "reference"}


@dataclasses.dataclass(frozen=True)
class System:
    """One row.

    Attributes:
        key: short name; a method of that key is the system.
        title: of the paper or the project.
        family: one of ``FAMILIES``.
        scope: of ``SCOPES``: to be built, to be a recipe of what is built, or only to compare with.
        source: arXiv id, address or venue.
        what: what it is, in one sentence.
        at: public names in which it is here, beside a method of its key.
        missing: what those lack of it.

    Raises:
        OptionError: for another family or scope, or a public name that is not there.
    """

    key: str
    title: str
    family: str
    scope: str
    source: str
    what: str
    at: Sequence[str] = ()
    missing: str = ""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES or self.scope not in SCOPES:
            raise OptionError(f"system {self.key!r}: unknown family {self.family!r} or scope {self.scope!r}")
        for name in self.at:
            module, _, attribute = name.rpartition(".")
            if not hasattr(importlib.import_module(module), attribute):
                raise OptionError(f"system {self.key!r} is said to be at {name!r}, which does not exist")


def read_systems(path: Path = FILE) -> list[System]:
    """All rows.

    Raises:
        OptionError: if two have the same key, or as ``System``.
    """
    rows = [System(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    twice = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if twice:
        raise OptionError(f"systems that are listed twice: {', '.join(twice)}")
    return rows


def places(system: System) -> list[str]:
    """Links to all in which a system is here."""
    cards = [row.key for row in registry.methods() if row.key == system.key]
    names = [link(f"`{name.rpartition('.')[2]}`", f"reference.md#{name}") for name in system.at]
    return [*(link("card", f"methods.md#{key}") for key in cards), *names]


def standing(system: System, results: Mapping[str, Result]) -> str:
    """How much of a system is here: "built", "in part", "tested", or what its scope says.

    Args:
        system: a row.
        results: of evidence, by key.
    """
    if places(system):
        return "in part" if system.missing else "built"
    return "tested" if system.key in results else SCOPES[system.scope]


def systems_page(results: Mapping[str, Result], rows: Sequence[System] | None = None) -> str:
    """Markdown of all groups; what has a card or a result and no row comes last.

    Args:
        results: of evidence, by key.
        rows: those of the file, if not given.
    """
    rows = read_systems() if rows is None else rows
    groups = [(title, [row for row in rows if row.family == family]) for family, title in FAMILIES.items()]
    parts = [_counts(rows, results), *(_group(title, members, results) for title, members in groups if members)]
    return "\n\n".join([*parts, _others({row.key for row in rows}, results)])


def _counts(rows: Sequence[System], results: Mapping[str, Result]) -> str:
    counts = Counter(standing(row, results) for row in rows)
    told = [f"{counts[name]} {name}" for name in ("built", "in part", "tested", *SCOPES.values()) if counts[name]]
    return f"**{len(rows)} systems**: {'; '.join(told)}. {sum(row.key in results for row in rows)} with evidence."


def _group(title: str, rows: Iterable[System], results: Mapping[str, Result]) -> str:
    cells = ((_name(row), row.what, _state(row, results) + _verdict(row.key, results)) for row in rows)
    return f"## {title}\n\n" + table(("system", "what it is", "here"), cells)


def _name(row: System) -> str:
    if row.source.startswith("arXiv:"):
        return f"**{row.key}**<br>{link(row.title, 'https://arxiv.org/abs/' + row.source[6:])}"
    if row.source.startswith("https://"):
        return f"**{row.key}**<br>{link(row.title, row.source)}"
    return f"**{row.key}**<br>{row.title}, {row.source}"


def _state(row: System, results: Mapping[str, Result]) -> str:
    found = ", ".join(places(row))
    without = f" without {row.missing}" if row.missing else ""
    stands = standing(row, results)
    return f"{stands}: {found}{without}" if found else stands


def _verdict(key: str, results: Mapping[str, Result]) -> str:
    return f"<br>claim: {link(results[key].verdict, f'evidence.md#{key}')}" if key in results else ""


def _others(listed: set[str], results: Mapping[str, Result]) -> str:
    cards = {row.key: row.summary for row in registry.methods() if row.key not in listed}
    claims = {key: result.claim for key, result in results.items() if key not in listed}
    rows = ((f"**{key}**", what, _here(key, cards, results)) for key, what in sorted({**claims, **cards}.items()))
    return f"## Beside the list\n\n{BESIDE}\n\n" + table(("name", "what it is", "here"), rows)


def _here(key: str, cards: Mapping[str, str], results: Mapping[str, Result]) -> str:
    card = f"built: {link('card', f'methods.md#{key}')}" if key in cards else ""
    return (card + _verdict(key, results)).removeprefix("<br>")
