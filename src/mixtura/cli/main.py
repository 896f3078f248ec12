"""``mixtura``: the commands, and the one place where errors become a line and an exit code.

Exit codes: 0 done; 2 bad input or a full disk, one line says which; 130 interrupted; 1 a bug of ours. With MIXTURA_DEBUG=1
the traceback is shown. Libraries that take seconds to import are imported inside of the commands.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import click
import typer

import mixtura
from mixtura.cli import catalog, demo, models, seeing, training
from mixtura.core.errors import MixturaError

app = typer.Typer(
    name="mixtura",
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


for module in (demo, catalog, models, training, seeing):
    module.add_commands(app)


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        app(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted; what was complete is kept")
        sys.exit(130)
    except (MixturaError, OSError) as error:
        _fail(error, 2)
    except Exception as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    if os.environ.get("MIXTURA_DEBUG"):
        traceback.print_exception(error)
    hint = "" if code == 2 else " (this is a bug; MIXTURA_DEBUG=1 shows where)"
    kind = "" if isinstance(error, MixturaError) else f"{type(error).__name__}: "
    _say(f"error: {kind}{' '.join(str(error).split())}{hint}")
    sys.exit(code)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
