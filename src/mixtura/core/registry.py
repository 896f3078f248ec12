"""The table of methods. A method is one file and one decorator; its signature is its configuration.

Built-in methods are found by importing every module of the folders in ``FOLDERS``; third parties add theirs through the
entry-point group ``mixtura.plugins``. Adding a method changes no other file.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import logging
import pkgutil
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from mixtura.core.errors import OptionError, unknown_name

logger = logging.getLogger("mixtura")

FOLDERS = ("mixtura.nn.routers", "mixtura.nn.experts", "mixtura.nn.balance", "mixtura.nn.layers", "mixtura.surgery")
PLUGINS = "mixtura.plugins"

Builder = TypeVar("Builder", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        key: the catalogue's name.
        role: what it is: "router", "experts", "balance", "layer", "surgery" ...
        build: the class or function.
        paper: where it was published, "" if nowhere.
        seeds: the mission's documents that ask for it.
        causal: False if a token's routing may depend on later tokens.
    """

    key: str
    role: str
    build: Callable[..., Any]
    paper: str = ""
    seeds: tuple[str, ...] = ()
    causal: bool = True

    @property
    def module(self) -> str:
        """The file the method lives in, as a module name."""
        return self.build.__module__

    @property
    def summary(self) -> str:
        """First line of the card; of the builder where several methods share a file."""
        alone = sum(row.module == self.module for row in _TABLE.values()) == 1
        doc = (inspect.getdoc(importlib.import_module(self.module)) if alone else None) or inspect.getdoc(self.build)
        return doc.splitlines()[0] if doc else ""

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The configuration schema: the parameters of the signature."""
        return {name: p for name, p in inspect.signature(self.build).parameters.items() if name != "self"}

    def check(self, options: Iterable[str]) -> None:
        """Raise ``OptionError`` if an option does not exist; the nearest one is named."""
        for name in options:
            if name not in self.options:
                raise OptionError(str(unknown_name(f"option of method {self.key!r}", name, self.options)))

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Build or run the method.

        Raises:
            OptionError: if an option does not exist (the nearest one is named) or a required one is missing.
        """
        self.check(options)
        try:
            inspect.signature(self.build).bind(*args, **options)
        except TypeError as error:
            raise OptionError(f"method {self.key!r}: {error}") from None
        return self.build(*args, **options)


_TABLE: dict[str, Method] = {}


def method(
    key: str, *, role: str, paper: str = "", seeds: tuple[str, ...] = (), causal: bool = True
) -> Callable[[Builder], Builder]:
    """Register a class or function as a method.

    An instance of the class also gets ``method_config``, ``{"method": key, **arguments}``, which builds an equal one;
    that of a subclass only if it is registered itself.

    Args:
        key: the catalogue's name; must be new.
        role: see ``Method``.
        paper: arXiv id or venue.
        seeds: the mission's documents that ask for it.
        causal: see ``Method``.

    Raises:
        OptionError: if the key is taken by another builder.
    """

    def register(build: Builder) -> Builder:
        known = _TABLE.get(key)
        if known is not None and _place(known.build) != _place(build):
            raise OptionError(f"method {key!r} is taken by {known.module}, cannot register {build.__module__}")
        if inspect.isclass(build):
            _remember_arguments(build, key)
        _TABLE[key] = Method(key, role, build, paper, seeds, causal)
        return build

    return register


def get(key: str) -> Method:
    """The method of that key.

    Raises:
        UnknownNameError: with the nearest key.
    """
    if key not in _TABLE:
        load_all()
    if key not in _TABLE:
        raise unknown_name("method", key, _TABLE)
    return _TABLE[key]


def methods(role: str | None = None) -> list[Method]:
    """All methods, or those of one role, by key."""
    load_all()
    return [row for _, row in sorted(_TABLE.items()) if role in (None, row.role)]


def build(config: Mapping[str, Any]) -> Any:
    """Build from ``{"method": key, **options}``, as ``method_config`` stores it."""
    options = dict(config)
    try:
        key = options.pop("method")
    except KeyError:
        raise OptionError(f"a method's configuration needs the entry 'method', got {sorted(options)}") from None
    return get(key)(**options)


@functools.cache
def load_all() -> None:
    """Import every built-in method and every plug-in, once; a plug-in that fails is logged, never fatal."""
    for folder in FOLDERS:
        for module in _import_folder(folder):
            logger.debug("methods of %s loaded", module.__name__)
    for entry in importlib.metadata.entry_points(group=PLUGINS):
        try:
            entry.load()
        except Exception as error:
            logger.warning("plug-in %s of group %s could not be loaded: %s", entry.name, PLUGINS, error)


def _place(build: Callable[..., Any]) -> tuple[str, str]:
    return build.__module__, build.__qualname__


def _import_folder(folder: str) -> list[types.ModuleType]:
    package = importlib.import_module(folder)
    return [importlib.import_module(f"{folder}.{found.name}") for found in pkgutil.iter_modules(package.__path__)]


def _no_arguments(self: Any) -> None:
    """``__init__`` of a class without one, whose own signature would be that of any."""


def _remember_arguments(cls: Any, key: str) -> None:
    """Wrap ``cls.__init__`` so that the instance keeps its arguments in ``method_config``."""
    original = _no_arguments if cls.__init__ is object.__init__ else cls.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        bound = signature.bind(self, *args, **options)
        bound.apply_defaults()
        original(self, *args, **options)
        if type(self) is cls:
            arguments = dict(list(bound.arguments.items())[1:])
            self.method_config = {"method": key, **arguments}

    cls.__init__ = __init__
