"""``Runner``: computes the runs of an arm, on several processes, or takes them from the cache.

Every run has one thread of its own; seconds are those of its processor, so they mean the same beside other runs.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeAlias

from mixtura.core.errors import OptionError
from mixtura.core.files import cache_folder, write_file
from mixtura.evidence.code import digests, modules_of

Figures: TypeAlias = dict[str, float]
Task: TypeAlias = tuple[Mapping[str, Any], int]


class Runner:
    """Computes figures of (function, configuration, seed).

    Args:
        script: file of the script whose functions are run; None if they belong to modules.
        jobs: processes; 0 computes in this one, without a cache.
        say: called with a line after every run.
    """

    def __init__(self, script: Path | None, *, jobs: int = 2, say: Callable[[str], None] = lambda line: None) -> None:
        if jobs < 0:
            raise OptionError(f"jobs must be at least 0, got {jobs}")
        self.script, self.jobs, self.say = script, jobs, say
        self.code: dict[str, str] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., Mapping[str, float]], tasks: Sequence[Task]) -> list[Figures]:
        """Figures of every task, in their order.

        Raises:
            OptionError: if a configuration is no JSON, or a figure no number.
        """
        places = [self._place(function, config, seed) for config, seed in tasks]
        known = [self._cached(place) for place in places]
        missing = [n for n, figures in enumerate(known) if figures is None]
        computed = iter(self._compute(function, [tasks[n] for n in missing], [places[n] for n in missing]))
        return [figures if figures is not None else next(computed) for figures in known]

    def _place(self, function: Callable[..., Any], config: Mapping[str, Any], seed: int) -> Path:
        module = sys.modules[function.__module__]
        scripts = {function.__module__: self.script} if self.script and _is_script(function) else {}
        code = digests(modules_of(module, config), scripts)
        self.code |= code
        try:
            what = json.dumps([function.__module__, function.__qualname__, config, seed, code], sort_keys=True)
        except TypeError as error:
            raise OptionError(f"the configuration of {function.__qualname__} must be plain JSON: {error}") from None
        return cache_folder() / "evidence" / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json"

    def _cached(self, place: Path) -> Figures | None:
        if self.jobs == 0 or not place.exists():
            return None
        try:
            figures: Figures = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a file that was damaged is computed again
            return None
        return figures

    def _compute(self, function: Callable[..., Any], tasks: Sequence[Task], places: Sequence[Path]) -> list[Figures]:
        name = self._name(function)
        calls = [
            (name, config, seed, place if self.jobs else None)
            for place, (config, seed) in zip(places, tasks, strict=True)
        ]
        results = map(_run, calls) if self.jobs == 0 else self._workers().map(_run, calls)
        found = []
        for figures, (config, seed) in zip(results, tasks, strict=True):
            found.append(figures)
            self.say(f"seed {seed}  {json.dumps(config)[:100]}  {_shown(figures)}")
        return found

    def _name(self, function: Callable[..., Any]) -> tuple[str, str, str]:
        return str(self.script) if _is_script(function) else "", function.__module__, function.__qualname__

    def _workers(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.jobs, context, initializer=_one_thread)
        return self._pool


def _is_script(function: Callable[..., Any]) -> bool:
    return function.__module__.startswith("mixtura_evidence_")


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"


def _run(call: tuple[tuple[str, str, str], Mapping[str, Any], int, Path | None]) -> Figures:
    """Compute one run, and keep it in the cache if it has a place there."""
    (script, module, name), config, seed, place = call
    from mixtura.evidence.scripts import load_module

    source = load_module(Path(script)) if script else importlib.import_module(module)
    begun = time.process_time()
    found = getattr(source, name)(seed=seed, **config)
    figures = {"seconds": time.process_time() - begun} | {figure: float(value) for figure, value in found.items()}
    wrong = [figure for figure, value in figures.items() if not math.isfinite(value)]
    if wrong:
        raise OptionError(f"{name} with seed {seed} gave no finite number for {', '.join(wrong)}")
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        with write_file(place) as partial:
            partial.write_text(json.dumps(figures), encoding="utf-8")
    return figures


def _shown(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
