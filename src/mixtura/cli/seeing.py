"""Command: ``inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.options import Json, Model, domain_names, say_skipped, show


def inspect(
    model: Model,
    text: Annotated[str | None, typer.Option(help="Text to run; instead of domains.")] = None,
    domains: Annotated[
        str, typer.Option(help="Domains whose held-out text is run, by comma; all if there is no text.")
    ] = "",
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    trace: Annotated[Path | None, typer.Option(help="File for the trace itself.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each domain, at most.")] = 2048,
    as_json: Json = False,
) -> None:
    """See which expert fires where: run text through a mixture and write a report.

    Example: mixtura inspect runs/demo/mixture --domains man-de,shakespeare --out report.html
    """
    from mixtura.core.errors import OptionError

    if text is not None and domains:
        raise OptionError("inspect takes --text or --domains, not both")
    if text is not None:
        documents = {"text": [text]}
    else:
        from mixtura.data import Corpus

        corpus = Corpus.load(domain_names(domains))
        say_skipped(corpus.skipped)
        documents = corpus.held_out
    from mixtura.hf.load import load_model
    from mixtura.traces.inspect import capture_documents
    from mixtura.traces.metrics import balance, specialization
    from mixtura.traces.report import write_report

    loaded, tokenizer = load_model(model)
    seen = capture_documents(loaded, tokenizer, documents, max_tokens=tokens)
    write_report(out, trace=seen, tokenizer=tokenizer)
    if trace is not None:
        seen.save(trace)
    by_layer = {
        name: {"violation": row.violation, "effective_experts": row.effective} for name, row in balance(seen).items()
    }
    result = {"report": str(out), "balance": by_layer, "specialization": specialization(seen)}
    show(result, as_json=as_json, lines=f"{out}: {len(seen):,} decisions in {len(by_layer)} layers")


def add_commands(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(inspect)
