"""What several commands share: options, and how results are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
import yaml

from mixtura.core.errors import OptionError

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Model = Annotated[str, typer.Argument(help="A known name (smollm2-135m), a folder, a .gguf file, or an id on the Hub.")]
Domains = Annotated[
    str, typer.Option(help="Domains of text, by comma; NAME=PATH is text of your own. Default: all known ones.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


def method_option(help: str) -> Any:
    """``--option``, for what a method or quantizer knows and the command does not."""
    return typer.Option(help=help, callback=_no_flags)


def _no_flags(context: typer.Context, pairs: list[str]) -> list[str]:
    """What a command has by itself is not accepted as an option of the method.

    Raises:
        OptionError: if it is.
    """
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in (pair.partition("=")[0] for pair in pairs):
        if name in flags:
            raise OptionError(f"{name!r} is no option of the method; the command takes it as {flags[name]}")
    return pairs


def key_values(pairs: Sequence[str]) -> dict[str, Any]:
    """``["copies=4"]`` as ``{"copies": 4}``; values are read as YAML.

    Raises:
        OptionError: if a pair has no "=", or its value is no YAML.
    """
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise OptionError(f"an option must be NAME=VALUE, got {pair!r}")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise OptionError(f"the value of option {name!r} is no YAML: {text!r}") from None
    return values


def domain_names(text: str) -> list[str]:
    """Names by comma; all known domains if there are none."""
    from mixtura.data import DOMAINS

    return [name.strip() for name in text.split(",") if name.strip()] or list(DOMAINS)


def show(result: Mapping[str, Any], *, as_json: bool, lines: str) -> None:
    """Print a result for machines or for people."""
    typer.echo(json.dumps(result, indent=2) if as_json else lines)


def say_skipped(skipped: Mapping[str, str]) -> None:
    """One line for each domain that could not be had."""
    for name, reason in skipped.items():
        print(f"without {name}: {reason}", file=sys.stderr)
