"""Command: ``doctor``."""

from __future__ import annotations

import typer

from mixtura.cli.options import Json, Model, show


def doctor(model: Model, as_json: Json = False) -> None:
    """Prove what of a model is loaded, gets gradient, is frozen, quantized or dead, and what an export lacks.

    Runs 128 random tokens forward and backward. A model that cannot be loaded is compared with its files. Exit code 0
    if it could be examined, whatever was found.

    Example: mixtura doctor runs/demo/mixture
    """
    from mixtura.hf.doctor import examine
    from mixtura.hf.doctor_text import report_text

    report = examine(model)
    show(report.to_dict(), as_json=as_json, lines=report_text(report))


def add_commands(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(doctor)
