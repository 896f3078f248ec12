"""Public names are documented: those of the reference's modules, and those that packages export."""

import functools
import importlib
import inspect
import pkgutil
import re

import pytest

import mixtura
from docs.pages import ROOT, text

PACKAGES = [name for _, name, package in pkgutil.walk_packages(mixtura.__path__, "mixtura.") if package]
NAMED = re.findall(r"^::: (\S+)$", text(ROOT / "docs" / "reference.md"), re.MULTILINE)


def exported(module):
    """Classes and functions of ``__all__``; without one, those that the module defines."""
    names = getattr(module, "__all__", None)
    found = {name: getattr(module, name) for name in names or vars(module) if not name.startswith("_")}
    code = {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isroutine(value)}
    return code if names else {name: value for name, value in code.items() if value.__module__ == module.__name__}


def undocumented(module):
    """Names without a docstring, of their own or of the method that they override."""
    for name, value in exported(module).items():
        if not value.__doc__:
            yield name
        if inspect.isclass(value):
            yield from (f"{name}.{part}" for part in _own(value) if not _told(value, part))


def _own(cls):
    """Public methods and properties that are written in mixtura."""
    kinds = (property, functools.cached_property, staticmethod, classmethod)
    bases = [base for base in cls.__mro__ if base.__module__.startswith("mixtura")]
    ours = {name: value for base in bases for name, value in vars(base).items() if not name.startswith("_")}
    return [name for name, value in ours.items() if inspect.isfunction(value) or isinstance(value, kinds)]


def _told(cls, part):
    return any(getattr(vars(base).get(part), "__doc__", None) for base in cls.__mro__)


@pytest.mark.parametrize("name", sorted({*NAMED, *PACKAGES}))
def test_public_names_have_docstrings(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert list(undocumented(module)) == []


def test_modules_are_named_once():
    assert len(NAMED) == len(set(NAMED)) > 30


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_exports_is_in_the_reference(package):
    module = importlib.import_module(package)
    missing = [name for name, value in exported(module).items() if not {package, value.__module__} & set(NAMED)]
    assert missing == []


def test_a_name_without_a_docstring_is_found():
    class Documented:
        """It is."""

        def told(self):
            """It is."""

        def untold(self):
            pass

        @property
        def also_untold(self):
            return 1

    class Overriding(Documented):
        """Its method has the docstring of the one that it overrides."""

        def told(self):
            pass

    def plain():
        pass

    module = type(mixtura)("mixtura.example")
    for value in (Documented, Overriding, plain):
        value.__module__ = module.__name__
        setattr(module, value.__name__, value)
    parts = {f"{name}.{part}" for name in ("Documented", "Overriding") for part in ("untold", "also_untold")}
    assert set(undocumented(module)) == parts | {"plain"}
