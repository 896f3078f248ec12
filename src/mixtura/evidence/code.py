"""Which code a run depends on, as digests that comments, docstrings and formatting do not change.

A function depends on its own module, on the modules in which what that module imports from mixtura is defined, on
theirs if they are rigs or scripts, and on those of the methods that a configuration names. How experts are computed
(the backends) does not count: it is proven to make no difference.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mixtura.core import registry

RIGS = "mixtura.evidence.rigs."
_HARNESS = ("mixtura.evidence", "mixtura.nn.backends")


def modules_of(module: types.ModuleType, config: Any = None) -> set[str]:
    """Names of the modules that functions of a module depend on, under a configuration."""
    keys = {row.key: row.module for row in registry.methods()} if config is not None else {}
    found = _closure(module) | {keys[word] for word in _words(config) if word in keys}
    return {name for name in found if name.startswith(RIGS) or not name.startswith(_HARNESS)}


def _closure(module: types.ModuleType) -> set[str]:
    known, new = set(), {module.__name__}
    while new:
        name = new.pop()
        known.add(name)
        if name == module.__name__ or name.startswith(RIGS):
            source = module if name == module.__name__ else importlib.import_module(name)
            new |= set(_imported(source)) - known
    return known


def _imported(module: types.ModuleType) -> Iterator[str]:
    """Modules of mixtura that define what a module imports."""
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mixtura"):
            source = importlib.import_module(str(node.module))
            for alias in node.names:
                value = getattr(source, alias.name, None)
                if isinstance(value, types.ModuleType):
                    yield value.__name__
                elif value is None:
                    yield f"{node.module}.{alias.name}"
                else:
                    yield getattr(value, "__module__", None) or str(node.module)


def _words(config: Any) -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield str(key)
            yield from _words(value)
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _words(value)
    elif isinstance(config, str):
        yield config


def digests(modules: Iterable[str], scripts: Mapping[str, Path]) -> dict[str, str]:
    """Digest by module; that of a module which is not there is empty.

    Args:
        modules: names.
        scripts: files of those that are scripts, by module name.
    """
    return {name: _digest(scripts.get(name) or _file(name)) for name in sorted(modules)}


def _file(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def script_digest(path: Path) -> str:
    """Digest of a whole script, of what judges its runs too."""
    return _digest(path, judging=True)


def _digest(path: Path | None, *, judging: bool = False) -> str:
    if path is None or not path.exists():
        return ""
    tree = _Bare(judging).visit(ast.parse(path.read_text(encoding="utf-8")))
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


class _Bare(ast.NodeTransformer):
    """Removes docstrings, and unless wanted what judges runs but does not compute them: the function @evidence."""

    def __init__(self, judging: bool) -> None:
        self.judging = judging

    def _without_docstring(self, node: Any) -> Any:
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:]
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        """Remove a function under ``@evidence``; else its docstring."""
        calls = [call.func for call in node.decorator_list if isinstance(call, ast.Call)]
        if not self.judging and any(isinstance(call, ast.Name) and call.id == "evidence" for call in calls):
            return None
        return self._without_docstring(node)

    visit_Module = visit_ClassDef = visit_AsyncFunctionDef = _without_docstring
