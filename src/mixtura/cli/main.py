"""``mixtura``: the commands, and the one place where errors become a line and an exit code.

Exit codes: 0 done; 2 bad input or a full disk, one line says which; 130 interrupted; 1 a bug of ours. With
MIXTURA_DEBUG=1 the traceback is shown. Libraries that take seconds to import are imported inside of the commands.
"""

from __future__ import annotations

import os
import traceback
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import mixtura
from mixtura.cli import bench, catalog, demo, density, doctor, evidence, models, seeing, training
from mixtura.core.errors import MixturaError


class _Commands(TyperGroup):
    """Turns what a command raises into one line on standard error."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; wrong usage of the command line itself is left to typer, which exits with 2 too."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted; what was complete is kept", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code"):  # typer's own: wrong usage
                raise
            full = "os error 28" in str(error)  # safetensors tells a full disk in words alone
            _fail(error, 2 if full or isinstance(error, MixturaError | OSError) else 1)


def _fail(error: Exception, code: int) -> NoReturn:
    if os.environ.get("MIXTURA_DEBUG"):
        traceback.print_exception(error)
    hint = "" if code == 2 else " (this is a bug; MIXTURA_DEBUG=1 shows where)"
    kind = "" if isinstance(error, MixturaError) else f"{type(error).__name__}: "
    typer.echo(f"error: {kind}{' '.join(str(error).split())}{hint}", err=True)
    raise typer.Exit(code)


app = typer.Typer(
    name="mixtura",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="One workbench for mixtures: make them, train them, see what they do.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mixtura {mixtura.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for module in (demo, catalog, models, training, seeing, doctor, density, bench, evidence):
    module.add_commands(app)


def main() -> None:
    """Run the command line and exit with its code."""
    app()


if __name__ == "__main__":
    main()
