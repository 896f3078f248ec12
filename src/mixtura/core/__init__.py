"""The algebra every mixture shares: ``Routing``, its statistics, ``select``, and the table of methods.

Works on numpy arrays and torch tensors alike and imports neither.
"""

from mixtura.core.errors import (
    FetchError,
    FileFormatError,
    MixturaError,
    MixturaWarning,
    NotExpressibleError,
    OptionError,
    ShapeError,
    UnknownNameError,
)
from mixtura.core.registry import Method, method
from mixtura.core.routing import Routing
from mixtura.core.selection import SelectionSpec, select

__all__ = [
    "FetchError",
    "FileFormatError",
    "Method",
    "MixturaError",
    "MixturaWarning",
    "NotExpressibleError",
    "OptionError",
    "Routing",
    "SelectionSpec",
    "ShapeError",
    "UnknownNameError",
    "method",
    "select",
]
