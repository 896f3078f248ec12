"""Command: ``bench``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def bench(
    kind: Annotated[str, typer.Argument(help="limits, layer, decode, prefill, train, memory or density.")],
    cases: Annotated[str, typer.Option(help="Pattern of the names of cases, such as 'B/bf16/*'.")] = "*",
    peers: Annotated[
        str | None, typer.Option(help="Peers beside transformers, by comma, or none. Default: all that are set up.")
    ] = None,
    peers_folder: Annotated[
        Path | None, typer.Option(envvar="MIXTURA_PEERS", help="Folder with an environment for each peer.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in turns; the median is told.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Of all contestants. Default: torch's.")] = None,
    clock: Annotated[
        str, typer.Option(help="wall, or processor: the seconds in which one thread computes (with --threads 1).")
    ] = "wall",
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a quiet machine, each round.")] = 60.0,
    lock: Annotated[Path | None, typer.Option(help="File that benchmarks of this machine lock in turns.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the result as JSON; - for standard output.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the other cases of that file in it: same machine, same versions.")
    ] = False,
) -> None:
    """Measure the limits of this machine, and layers, decoding, prompts, training and memory against peers in turns.

    Example: mixtura bench layer --cases 'A/bf16/*' --json layer.json --keep
    """
    import torch

    from mixtura.bench import run_bench
    from mixtura.bench.report import lines

    if threads is not None:
        torch.set_num_threads(threads)
    to_stdout = json_file == Path("-")
    names = None if peers is None else [n.strip() for n in peers.split(",") if n.strip() not in ("", "none")]
    told = run_bench(
        kind,
        cases=cases,
        peers=names,
        peers_folder=peers_folder,
        rounds=rounds,
        clock=clock,
        patience=patience,
        lock=lock,
        path=None if to_stdout else json_file,
        keep=keep,
        tell=lambda rows: print(*lines(rows), sep="\n", file=sys.stderr if to_stdout else sys.stdout, flush=True),
    )
    for case, out in told["left_out"].items():
        for who, why in out.items():
            typer.echo(f"{case}: without {who}: {why}", err=True)
    if told["quiet"] is None:
        typer.echo("careful: whether the machine was quiet cannot be known here", err=True)
    elif not told["quiet"]:
        typer.echo("careful: others used the machine in some rounds; only ratios within a case count", err=True)
    if to_stdout:
        typer.echo(json.dumps(told, indent=2))


def add_commands(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(bench)
