"""One benchmark from its name to its report."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixtura.bench.measuring import CLOCKS, ROUNDS, Watch
from mixtura.bench.peers import found_peers
from mixtura.bench.report import Case, Report
from mixtura.core.errors import OptionError, unknown_name

KINDS = ("limits", "layer", "decode", "prefill", "train", "memory", "density")


def run_bench(
    kind: str,
    *,
    cases: str = "*",
    peers: Sequence[str] | None = None,
    peers_folder: Path | None = None,
    rounds: int = ROUNDS,
    clock: str = "wall",
    patience: float = 60.0,
    lock: Path | None = None,
    path: Path | None = None,
    keep: bool = False,
    tell: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> dict[str, Any]:
    """Time the cases of a benchmark.

    Args:
        kind: one of ``KINDS``.
        cases: pattern of the names of those wanted, such as "B/bf16/*".
        peers: names; None for all that are set up, an empty list for none. transformers always takes part.
        peers_folder: where they are set up; see ``found_peers``.
        rounds: that count, of each case.
        clock: "wall", or "processor" for the seconds in which one thread computes, on machines that are never quiet.
        patience: seconds to wait for a quiet machine before each round.
        lock: file that benchmarks of one machine lock in turns.
        path: JSON file, written anew after each case.
        keep: whether cases that the file has already stay in it, unless they are timed anew.
        tell: called with the rows of each case.

    Returns:
        What ``mixtura.bench.report`` describes.

    Raises:
        UnknownNameError: if there is no such kind, clock or peer.
        OptionError: if no case matches, a peer that was asked for is not set up, the path is a folder, or what is
            to be kept is of another machine, clock or other versions; or if the clock is "processor" and torch has
            several threads.
    """
    import torch

    if kind not in KINDS:
        raise unknown_name("benchmark", kind, KINDS)
    if clock not in CLOCKS:
        raise unknown_name("clock", clock, CLOCKS)
    if clock == "processor" and torch.get_num_threads() > 1:
        raise OptionError(f"the clock 'processor' is for one thread (--threads 1), got {torch.get_num_threads()}")
    if rounds < 1:
        raise OptionError(f"rounds must be at least 1, got {rounds}")
    if path is not None and path.is_dir():
        raise OptionError(f"the result must go to a file, got the folder {str(path)!r}")
    there = found_peers(peers_folder, peers)
    report = Report(kind, torch.get_num_threads(), path, keep=keep, clock=clock)
    shared = {"wanted": lambda name: fnmatch.fnmatchcase(name, cases), "rounds": rounds}
    with Watch(patience=patience, lock=lock, timer=clock) as watch:
        for case in _cases(kind, watch, there, report.versions, shared):
            tell(report.add(case))
    if not report.cases:
        raise OptionError(f"no case of {kind!r} matches {cases!r}")
    return report.to_dict()


def _cases(
    kind: str, watch: Watch, peers: dict[str, Path], versions: dict[str, str], shared: dict[str, Any]
) -> Iterator[Case]:
    function = getattr(importlib.import_module(f"mixtura.bench.{kind}"), kind)
    others = () if kind in ("limits", "train", "memory") else (peers, versions)
    return function(watch, *others, **shared)  # type: ignore[no-any-return]
