"""Command: ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.options import Json, Quiet


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for models, report and summary; a former run there is replaced.")
    ] = Path("runs/demo"),
    model: Annotated[
        str, typer.Option(help="Dense model to start from: a known name, a folder, or a Hub id.")
    ] = "smollm2-135m",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each arm, instead of the recipe's.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The whole tour on a real model and real text: fetch, upcycle, train, evaluate, see, save, reload, export.

    Example: mixtura demo --out runs/demo
    """
    import json

    from mixtura.tour import run_tour, table

    summary = run_tour(out, model=model, steps=steps, progress=not quiet)
    typer.echo(json.dumps(summary, indent=2) if as_json else table(summary))


def add_commands(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(demo)
