"""Which layers' weights a model's own code reads, beside calling the layers: these must stay what they are.

``self.proj.weight`` in a method counts for modules of that class and of classes that inherit from it; a layer that is
reached otherwise, as ``block.mlp.proj.weight`` or by a local name, for every module whose class is in the same file.
What only initializes weights is no reader.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator

from torch import nn

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_FRAMEWORK = ("torch.", "transformers.modeling_", "transformers.integrations.")


def is_read(model: nn.Module, name: str) -> bool:
    """Whether the code of the module that holds this layer, or of its file, reads the layer's weight."""
    place, _, child = name.rpartition(".")
    parent = model.get_submodule(place)
    while isinstance(parent, _LISTS) and place:  # the code names the list
        place, _, child = place.rpartition(".")
        parent = model.get_submodule(place)
    return any(child in _read_by(cls) for cls in type(parent).__mro__)


@functools.cache
def _read_by(cls: type) -> frozenset[str]:
    """Names of layers whose weights are read, of those that modules of this class hold."""
    if cls.__module__.startswith(_FRAMEWORK):
        return frozenset()
    return frozenset(child for child, owner in _reads(cls.__module__) if owner in (cls.__name__, ""))


@functools.cache
def _reads(module: str) -> frozenset[tuple[str, str]]:
    """Of a file: the name of a layer, and the class whose own it is or ""; nothing if there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return frozenset()
    bodies = {"": tree.body, **{node.name: node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}}
    methods = [(owner, node) for owner, body in bodies.items() for node in body if isinstance(node, ast.FunctionDef)]
    return frozenset(
        (child, owner if own else "")
        for owner, method in methods
        if "init" not in method.name
        for child, own in _in_function(method)
    )


def _in_function(function: ast.FunctionDef) -> Iterator[tuple[str, bool]]:
    """Layers that it reads the weights of, and whether they are attributes of ``self``."""
    local = _local_names(function)
    for node in ast.walk(function):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
            continue
        layer = node.value
        while isinstance(layer, ast.Subscript):  # of a list of layers
            layer = layer.value
        if isinstance(layer, ast.Attribute):
            yield layer.attr, isinstance(layer.value, ast.Name) and layer.value.id == "self"
        elif isinstance(layer, ast.Name):
            yield from ((child, False) for child in local.get(layer.id, ()))


def _local_names(function: ast.FunctionDef) -> dict[str, set[str]]:
    """What local names may stand for: all attributes and texts (``getattr``) of what they are set to, or drawn from."""
    names: dict[str, set[str]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.For | ast.comprehension):
            targets, value = [node.target], node.iter
        else:
            continue
        parts = list(ast.walk(value))
        children = {part.attr for part in parts if isinstance(part, ast.Attribute)}
        children |= {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
        for name in (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)):
            names.setdefault(name, set()).update(children)
    return names
