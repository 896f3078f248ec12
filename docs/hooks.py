"""Tables of the docs that are read from the code when the site is built, so that they cannot differ from it.

A page asks for one by the line ``<!-- generated: NAME -->``; the names are those of ``TABLES``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evidence_page import evidence_page
from markdown_table import table
from systems_page import systems_page

from mixtura.core import registry
from mixtura.core.errors import OptionError, unknown_name
from mixtura.core.registry import Method
from mixtura.core.selection import SelectionSpec
from mixtura.evidence.figure import quality_by_operations
from mixtura.evidence.scripts import known_results

ROOT = Path(__file__).resolve().parent.parent
_MARKER = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w+): (.*)$")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page: put the tables where they are asked for."""
    return _MARKER.sub(lambda found: generated(found[1]), markdown)


def generated(name: str) -> str:
    """Markdown of one table.

    Raises:
        UnknownNameError: with the nearest name.
    """
    if name not in TABLES:
        raise unknown_name("table of the docs", name, TABLES)
    return TABLES[name]()


def attributes(cls: type) -> dict[str, str]:
    """What the "Attributes:" part of a docstring says of each name.

    Raises:
        OptionError: if there is no such part.
    """
    _, found, part = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    if not found:
        raise OptionError(f"{cls.__name__} documents no attributes")
    said: dict[str, str] = {}
    name = ""
    for line in part.partition("\n\n")[0].splitlines():
        if entry := _ENTRY.match(line):
            name = entry[1]
            said[name] = entry[2]
        else:
            said[name] += " " + line.strip()
    return said


def _methods() -> str:
    roles = sorted({row.role for row in registry.methods()})
    return "\n\n".join(part for role in roles for part in _role(role))


def _role(role: str) -> list[str]:
    return [f"## {role.capitalize()}", *(_card(row) for row in registry.methods(role))]


def _card(row: Method) -> str:
    paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper[6:]})" if row.paper.startswith("arXiv:") else row.paper
    causal = "" if row.causal else "not causal"
    facts = ", ".join(part for part in (paper, f"`{row.module}`", causal, _verdict(row.key)) if part)
    alone = sum(other.module == row.module for other in registry.methods()) == 1
    text = inspect.getdoc(sys.modules[row.module] if alone else row.build) or ""
    return f"### {row.key}\n\n{facts}\n\n{_without_sections(text)}\n\n{_options(row)}"


def _verdict(key: str) -> str:
    found = known_results().get(key)
    return f"claim: [{found.verdict}](evidence.md#{key})" if found else ""


def _without_sections(card: str) -> str:
    return re.split(r"\n\n(?:Args|Raises|Returns|Source):\n", card)[0]


def _options(row: Method) -> str:
    shown = inspect.signature(row.build, eval_str=True).parameters
    rows = (
        (f"`{name}`", _annotation(shown[name]), "" if option.default is option.empty else f"`{option.default!r}`")
        for name, option in row.options.items()
    )
    return table(("option", "type", "default"), rows)


def _annotation(option: inspect.Parameter) -> str:
    # a table takes no bare "|", and shows an escaped one inside of code with its backslash
    shown = re.sub(r"\bmixtura\.[\w.]*\.", "", inspect.formatannotation(option.annotation))
    return f"`{shown.replace(' | ', ' or ')}`"


def _recipe() -> str:
    from mixtura.training.recipe import DataRecipe, Recipe, TrainRecipe

    sections = (("", Recipe), ("data.", DataRecipe), ("train.", TrainRecipe))
    return table(("field", "default", "what it is"), (row for path, cls in sections for row in _fields(path, cls)))


def _fields(path: str, cls: Any) -> Iterable[tuple[str, str, str]]:
    said = attributes(cls)
    for field in dataclasses.fields(cls):
        yield f"`{path}{field.name}`", _default(field), said[field.name]


def _default(field: Any) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()!r}`"
    return "required" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def _columns() -> str:
    from mixtura.traces.trace import COLUMNS, Trace

    said = attributes(Trace)
    return table(
        ("column", "type", "what it is"),
        ((f"`{name}`", f"`{dtype.__name__}`", said[name]) for name, dtype in COLUMNS.items()),
    )


def _selection() -> str:
    return table(("field", "default", "what it is"), _fields("", SelectionSpec))


def _bases() -> str:
    tried = runpy.run_path(str(ROOT / "tests" / "pico.py"))
    rows = [(f"`{name}`", "dense") for name in tried["DENSE"]]
    rows += [(f"`{name}`", "has native mixtures") for name in tried["SPARSE"]]
    return table(("model_type", "kind"), rows)


def _selections() -> str:
    from mixtura.hf.families import known_families

    return ", ".join(f"`{name}`" for name in known_families()) + "."


def _not_expressible() -> str:
    from mixtura.hf import families

    return table(("model_type", "why"), ((f"`{name}`", why) for name, why in sorted(families._OUTSIDE.items())))


def _native_families() -> str:
    facts = json.loads((ROOT / "docs" / "native_families.json").read_text(encoding="utf-8"))
    rows = (
        (f"`{name}`", f"`{row['same']}`" if row["same"] else "") for name, row in facts.items() if not row["refused"]
    )
    return table(("model_type", "its own router is"), rows)


def _outside_contract() -> str:
    from mixtura.hf.contract import OUTSIDE

    return table(("model_type", "why"), ((f"`{name}`", why) for name, why in sorted(OUTSIDE.items())))


def _targets() -> str:
    from mixtura.hf.capabilities import TARGETS, Target

    said = {name: text for name, text in attributes(Target).items() if name != "family"}
    rows = ((text.rstrip("."), *(_plain(getattr(target, name)) for target in TARGETS)) for name, text in said.items())
    return table(("capability", *(f"`{target.family}`" for target in TARGETS)), rows)


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_plain(part) for part in value)
    words = {"True": "yes", "False": "no", "None": "nothing", "1.0": "their sum"}
    return words.get(str(value), str(value))


def _sources() -> str:
    from mixtura.data import SOURCES

    rows = ((f"`{name}`", f"`{s.package}`", s.kind, s.license) for name, s in SOURCES.items())
    return table(("name", "package", "through", "license"), rows)


def _domains() -> str:
    from mixtura.data import DOMAINS

    rows = ((f"`{name}`", d.title, "yes" if d.download else "no") for name, d in DOMAINS.items())
    return table(("domain", "what it is", "download"), rows)


TABLES = {
    "systems": lambda: systems_page(known_results()),
    "evidence": lambda: evidence_page(known_results()),
    "evidence-figure": lambda: quality_by_operations(known_results().values()),
    "methods": _methods,
    "recipe": _recipe,
    "columns": _columns,
    "selection": _selection,
    "bases": _bases,
    "selections": _selections,
    "not-expressible": _not_expressible,
    "native-families": _native_families,
    "outside-contract": _outside_contract,
    "targets": _targets,
    "sources": _sources,
    "domains": _domains,
}
