"""Command: ``fit``."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.options import Json, show

_COLUMNS = (
    "Columns to use, by comma; all with numbers if not given. A name with a comma needs quotes of its own: "
    "'\"length, in cm\",width'."
)


class _Tried(Exception):
    """Ends a trial to write."""


def fit(
    data: Annotated[Path, typer.Argument(help="A table: text with commas, semicolons or tabs, or a .npy array.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    columns: Annotated[str, typer.Option(help=_COLUMNS)] = "",
    weight: Annotated[
        str | None, typer.Option(help="Column of row weights, which count rows: one of weight 2 is as two rows.")
    ] = None,
    components: Annotated[str, typer.Option(help="Numbers of components to try: 3, or 2,4; 1-9 if not given.")] = "",
    families: Annotated[str, typer.Option(help="Covariance families by comma, or all.")] = "all",
    criterion: Annotated[str, typer.Option(help="bic, icl, aic, or cv.")] = "bic",
    rows: Annotated[int, typer.Option(min=2, help="Rows to choose the model on, at most; all are fitted.")] = 20_000,
    save: Annotated[Path | None, typer.Option(help="File for the mixture, as safetensors.")] = None,
    assign: Annotated[Path | None, typer.Option(help="CSV file for the component of each row.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the starts.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    as_json: Json = False,
) -> None:
    """Find the groups of a table: a Gaussian mixture whose size and covariance family are chosen, and a report.

    Example: mixtura fit flowers.csv --out report.html
    """
    from mixtura.density.fit_table import fit_table
    from mixtura.density.report import plain, write_report
    from mixtura.density.table import read_table

    targets = {name: path for name, path in (("--out", out), ("--save", save), ("--assign", assign)) if path}
    _check_distinct({"the table": data, **targets})
    table = read_table(data)
    sizes = _numbers(components, len(table.data_ND)) if components else None
    families_asked = "all" if families == "all" else _by_comma(families)
    for path in targets.values():
        _try_to_write(path)
    found = fit_table(
        table,
        columns=_by_comma(columns),
        weight=weight,
        n_components=sizes,
        covariance=families_asked,
        criterion=criterion,
        rows=rows,
        n_jobs=jobs,
        random_state=seed,
    )
    title = f"{data.name}: {len(found.data_ND):,} rows, {len(found.names)} columns"
    told = write_report(out, found.search, found.data_ND, sample_weight=found.weights_N, title=title, notes=found.notes)
    if save is not None:
        found.search.best_estimator_.save(save)
    if assign is not None:
        _write_components(assign, found.components_N, found.probabilities_N)
    score = {"criterion": criterion, "score": found.search.best_.score, "rows_scored": found.rows_scored}
    result = {"report": str(out), **score, **told}
    show(plain(result), as_json=as_json, lines=_lines(out, told))


def _check_distinct(paths: Mapping[str, Path]) -> None:
    """Raise ``OptionError`` if two of the files are one, also through links."""
    from mixtura.core.errors import OptionError

    for (name, path), (other, other_path) in combinations(paths.items(), 2):
        same = os.path.realpath(path) == os.path.realpath(other_path)
        if same or (path.exists() and other_path.exists() and path.samefile(other_path)):
            raise OptionError(f"{other} must be another file than {name}, got {str(other_path)!r} for both")


def _try_to_write(path: Path) -> None:
    """Raise what would be raised when the file is written in the end; for long work, before it begins."""
    from mixtura.core.files import write_file

    with suppress(_Tried), write_file(path):
        raise _Tried


def _by_comma(text: str) -> list[str]:
    """Names by comma; quotes as in CSV."""
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    return [name.strip() for row in rows for name in row if name.strip()]


def _numbers(text: str, most: int) -> list[int]:
    """ "1-3,7" as [1, 2, 3, 7]."""
    from mixtura.core.errors import OptionError

    try:
        spans = [[int(end) for end in part.split("-")] for part in _by_comma(text)]
    except ValueError:
        spans = []
    if any(end > most for span in spans for end in span):
        raise OptionError(f"components must be at most {most:,}, as many as the table has rows, got {text!r}")
    numbers = sorted({K for span in spans for K in range(span[0], span[-1] + 1) if len(span) <= 2})
    if not numbers or numbers[0] < 1:
        raise OptionError(f"components must be numbers of at least 1, such as 3 or 2,4 or 1-9, got {text!r}")
    return numbers


def _write_components(path: Path, found_N: Iterable[int], sure_N: Iterable[float]) -> None:
    """Component of each row, numbered from 1 as in the report (0 for noise), and how sure that is."""
    from mixtura.core.files import write_file

    lines = [f"{k + 1},{sure:.6g}\n" for k, sure in zip(found_N, sure_N, strict=True)]
    with write_file(path) as partial:
        partial.write_text("component,probability\n" + "".join(lines), "utf-8")


def _lines(out: Path, told: dict) -> str:
    K = told["n_components"]
    parts = [f"{out}: {told['covariance']} with {K} component{'s' * (K > 1)}"]
    parts += [f"  {k}  {one['weight']:.1%}  {one['words']}" for k, one in enumerate(told["components"], 1)]
    return "\n".join([*parts, *(f"careful: {one}" for one in told["cautions"])])


def add_commands(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(fit)
