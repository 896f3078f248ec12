"""Command ``evidence``: repeat a published claim, list verdicts, name those that are stale."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from mixtura.cli.options import Json, Quiet, show
from mixtura.core.errors import MixturaError, OptionError


def evidence(
    key: Annotated[str, typer.Argument(help="Whose claim to measure; see --list.")] = "",
    list_all: Annotated[bool, typer.Option("--list", help="List claims and verdicts, and run nothing.")] = False,
    run_all: Annotated[bool, typer.Option("--all", help="Measure every claim.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Name results whose script or code has changed since; exit code 2 if any.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Only prove that it runs: seconds, one seed, nothing is written.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Runs at once, each with one thread.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder of results instead of the one beside the scripts.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure a published claim with a baseline at equal budget, over several seeds, and give a verdict.

    Example: mixtura evidence hash-routing --smoke
    """
    asked = [bool(key), list_all, run_all, check]
    if sum(asked) != 1:
        raise OptionError("give one of KEY, --list, --all and --check")
    if list_all:
        _list(as_json)
    elif check:
        _check(as_json)
    else:
        _run(key, smoke=smoke, jobs=jobs, out=out, quiet=quiet or as_json, as_json=as_json)


def _list(as_json: bool) -> None:
    from mixtura.evidence import find_scripts, load_script
    from mixtura.evidence.scripts import known_results

    results = known_results()
    rows = []
    for key in find_scripts():
        claim, result = load_script(key), results.get(key)
        rows.append({"key": key, "claim": claim.claim, "source": claim.source} | _verdict(result))
    lines = [f"{row['key']:28} {row['verdict'] or 'not run yet':20} {row['claim']}" for row in rows]
    show({"evidence": rows}, as_json=as_json, lines="\n".join(lines))


def _verdict(result: Any) -> dict[str, Any]:
    return {"verdict": result and result.verdict, "sentence": result and result.sentence}


def _check(as_json: bool) -> None:
    from mixtura.evidence import check, find_scripts
    from mixtura.evidence.scripts import known_results

    scripts, results = find_scripts(), known_results()
    stale = {key: found for key, result in results.items() if (found := check(result, scripts))}
    stale |= {key: ["it was never run"] for key in scripts if key not in results}
    lines = [f"{key}: {', '.join(reasons)}" for key, reasons in stale.items()] or [f"{len(results)} results are fresh"]
    show({"stale": stale}, as_json=as_json, lines="\n".join(lines))
    if stale:
        raise typer.Exit(2)


def _run(key: str, *, smoke: bool, jobs: int, out: Path | None, quiet: bool, as_json: bool) -> None:
    from mixtura.evidence import find_scripts, run_script

    results, failed = [], {}
    for name in [key] if key else find_scripts():
        try:
            results.append(run_script(name, smoke=smoke, jobs=jobs, out=out, say=_silent if quiet else _say))
        except MixturaError as error:
            if key:
                raise
            failed[name] = str(error)
    shown = {"results": [dataclasses.asdict(result) for result in results], "failed": failed}
    lines = [f"{result.key}: {result.verdict}. {result.sentence}" for result in results]
    show(shown, as_json=as_json, lines="\n".join(lines + [f"{name}: failed: {why}" for name, why in failed.items()]))
    if failed:
        raise typer.Exit(2)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _silent(line: str) -> None:
    pass


def add_commands(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(evidence)
