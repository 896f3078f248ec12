"""What becomes of the rows and positions of a cache between forward calls: beams reorder it, drafts are cropped."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import Cache


class CacheWatcher:
    """What is told of caches; both methods do nothing unless overridden."""

    def moved(self, cache: Any, index_of: Callable[[int], torch.Tensor]) -> None:
        """Rows were reordered, repeated or dropped; of so many rows, ``index_of`` gives the former one of each."""

    def cropped(self, cache: Any) -> None:
        """Positions at the end were removed, maybe none."""


@contextlib.contextmanager
def watch_caches(watcher: CacheWatcher) -> Iterator[None]:
    """Tell ``watcher`` what is done to any cache of transformers inside of the ``with``, after it has been done."""
    reports: dict[str, Callable[..., None]] = {
        "reorder_cache": lambda cache, beam_idx: watcher.moved(cache, lambda _: beam_idx),
        "batch_select_indices": lambda cache, indices: watcher.moved(cache, lambda _: indices),
        "batch_repeat_interleave": lambda cache, repeats: watcher.moved(
            cache, lambda rows: torch.arange(rows).repeat_interleave(repeats)
        ),
        "crop": lambda cache, *_, **__: watcher.cropped(cache),
    }
    busy: set[int] = set()
    patched = [(cls, name, vars(cls)[name]) for cls in _family(Cache) for name in reports if name in vars(cls)]
    for cls, name, method in patched:
        setattr(cls, name, _reporting(method, reports[name], busy))
    try:
        yield
    finally:
        for cls, name, method in patched:
            setattr(cls, name, method)


def _reporting(method: Callable[..., Any], report: Callable[..., None], busy: set[int]) -> Callable[..., Any]:
    """The method, and then the report; one report where the method calls that of a base class."""

    @functools.wraps(method)
    def call(cache: Any, *args: Any, **kwargs: Any) -> Any:
        if id(cache) in busy:
            return method(cache, *args, **kwargs)
        busy.add(id(cache))
        try:
            result = method(cache, *args, **kwargs)
        finally:
            busy.discard(id(cache))
        report(cache, *args, **kwargs)
        return result

    return call


def _family(cls: type[Any]) -> list[type[Any]]:
    children: list[type[Any]] = cls.__subclasses__()
    return [cls, *(below for child in children for below in _family(child))]
