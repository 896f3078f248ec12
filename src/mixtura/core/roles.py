"""Expressions that name parameters of a model by what they are for.

An expression names a role, some layers, or a role in some layers:

    "routers"  "experts"  "shared"  "mixtures" (all three)  "feed-forward" (the dense ones)  "attention"  "norms"
    "embeddings"  "head"  "adapters" (of PEFT)  "other"  "all"
    "layers[24:30]"  "layers[-1]"  "layers[24:30].routers"
    "experts[3]"  "experts[0:4]"  "layers[2].experts[0:4]"

Indices are Python's, without a step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mixtura.core.errors import OptionError, unknown_name

MIXTURES = ("routers", "experts", "shared")
ROLES = (*MIXTURES, "feed-forward", "attention", "norms", "embeddings", "head", "other")
NAMES = (*ROLES, "mixtures", "adapters", "layers", "all")

_PART = re.compile(r"([a-z-]+)(?:\[(-?\d+)?(?:(:)(-?\d+)?)?\])?")


def parse(expression: str) -> tuple[tuple[str, int | slice | None], ...]:
    """The parts of an expression: names with what stands in their brackets.

    Raises:
        UnknownNameError: for an unknown role, with the nearest.
        OptionError: if it cannot be read.
    """
    parts = []
    for text in expression.split(".") if isinstance(expression, str) else [""]:
        match = _PART.fullmatch(text)
        if match is None or (text.endswith("[]")):
            raise OptionError(f"a role is written as 'routers', 'layers[2:4]' or 'experts[3]', got {expression!r}")
        name, first, colon, last = match.groups()
        if name not in NAMES:
            raise unknown_name("role", name, NAMES)
        index = slice(*(None if bound is None else int(bound) for bound in (first, last))) if colon else first
        parts.append((name, int(index) if isinstance(index, str) else index))
    _check_parts(expression, parts)
    return tuple(parts)


def _check_parts(expression: str, parts: Sequence[tuple[str, int | slice | None]]) -> None:
    for name, index in parts:
        if index is not None and name not in ("layers", "experts"):
            raise OptionError(f"only layers and experts have numbers, got {expression!r}")
    if len(parts) > 2 or (len(parts) == 2 and (parts[0][0] != "layers" or parts[1][0] in ("layers", "all"))):
        raise OptionError(f"two parts are 'layers[...]' and a role in them, got {expression!r}")
