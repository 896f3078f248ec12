"""Commands: ``train`` and ``eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.options import Domains, Json, Model, Quiet, domain_names, say_skipped, show


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file.")],
    out: Annotated[Path | None, typer.Argument(help="New or empty folder; none with --dry-run.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count parameters, FLOPs and memory.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the newest complete checkpoint.")] = True,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train what a recipe says; run it again after a kill and it goes on to the same numbers.

    Example: mixtura train recipe.yaml out
    """
    from mixtura.core.errors import OptionError
    from mixtura.training.recipe import Recipe

    read = Recipe.load(recipe)
    if out is None and not dry_run:
        raise OptionError("train needs a folder to write to, or --dry-run")
    if dry_run or out is None:
        from mixtura.training.dry_run import dry_run as count
        from mixtura.training.dry_run import format_dry_run

        numbers = count(read)
        show(numbers, as_json=as_json, lines=format_dry_run(numbers))
        return
    from mixtura.training.train import train as run

    done = run(read, out, resume=resume, progress=not quiet)
    result = {"path": str(done.path), "tokens_trained": done.tokens_trained, "seconds": round(done.seconds, 1)}
    result |= {"history": done.history, "resumed_from": done.resumed_from}
    last = f", last cross-entropy {done.history[-1][1]:.4f}" if done.history else ""
    show(result, as_json=as_json, lines=f"{out}: {done.tokens_trained:,} tokens in {done.seconds:.0f} s{last}")


def evaluate(
    model: Model,
    domains: Domains = "",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each domain, at most.")] = 4096,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Bits per byte on held-out text, by domain.

    Example: mixtura eval smollm2-135m --domains code-python,man-de
    """
    from mixtura.data import Corpus

    corpus = Corpus.load(domain_names(domains))
    say_skipped(corpus.skipped)
    from mixtura.hf.load import load_model
    from mixtura.training.evaluate import bits_per_byte

    loaded, tokenizer = load_model(model)
    found = bits_per_byte(loaded, tokenizer, corpus.held_out, max_tokens=tokens, progress=not quiet)
    lines = "\n".join(f"{name:14} {value:.4f}" for name, value in found.items())
    show({"bits_per_byte": found, "skipped": corpus.skipped}, as_json=as_json, lines=lines)


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(train)
    app.command("eval")(evaluate)
