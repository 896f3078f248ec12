"""Errors of mixtura: each names the argument, the value seen and what is accepted.

All derive from ``MixturaError``, and from the built-in that callers of such a function expect to catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MixturaError(Exception):
    """Base of every error that mixtura raises on purpose; the command line prints it as one line and exits with 2."""


class ShapeError(MixturaError, ValueError):
    """An array has another shape than its partner arrays ask for."""


class OptionError(MixturaError, ValueError):
    """An option has a value outside of what is accepted, or does not exist."""


class UnknownNameError(MixturaError, KeyError):
    """A name (method, domain, model, layer ...) is not known; the message offers the nearest one."""

    def __str__(self) -> str:  # KeyError prints the repr of its argument
        return str(self.args[0])


class NotExpressibleError(MixturaError, ValueError):
    """A model, router or layer lies outside of what a form can hold; the message names the missing capability."""


class FileFormatError(MixturaError, ValueError):
    """A file or folder is not what it should be: truncated, tampered with, of another kind or of a newer version."""


class FetchError(MixturaError, OSError):
    """Something could not be brought into the cache."""


class MixturaWarning(UserWarning):
    """Something works, but not as one would expect; the message names it and what to do."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """Build the error for an unknown name, with the nearest known one.

    Args:
        kind: what the name stands for, in the singular: "method", "domain".
        name: what was asked for.
        known: all names that would have been accepted.
    """
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(choices) or 'none'}"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")
