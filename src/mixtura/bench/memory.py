"""From a folder to the first token: seconds, and the most memory that a process needed for it.

Every run is a process of its own. L tokens of one prompt.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mixtura.bench.measuring import Outcome, Timing, Watch, interleave
from mixtura.bench.models import SHAPES, make_model
from mixtura.bench.report import Case
from mixtura.hf.quantizer import quantize_model

CASES = (("moe-1.3b", 512), ("moe-1.3b", 4096))
FEW_BITS = {"mixtura, 8 bits": 8, "mixtura, 4 bits": 4}


def memory(
    watch: Watch,
    *,
    wanted: Callable[[str], bool],
    rounds: int,
    cases: tuple[tuple[str, int], ...] = CASES,
    shapes: dict[str, tuple[str, dict[str, Any]]] = SHAPES,
) -> Iterator[Case]:
    """Time processes that load a model in bfloat16, or what ours saved of it with few bits, and read a prompt.

    A name of a case, as "moe-1.3b/L512", gives two: "moe-1.3b/L512/first token" in seconds, "moe-1.3b/L512/peak" in
    gigabytes. Files are in the memory of the system, so nothing is told of the speed of a disk.

    Args:
        watch: over the machine.
        wanted: whether a case of that name is.
        rounds: as in ``interleave``.
        cases: model, L.
        shapes: of the models.
    """
    for model_name in dict.fromkeys(name for name, _ in cases):
        names = {f"{name}/L{L}": L for name, L in cases if name == model_name and wanted(f"{name}/L{L}")}
        if names:
            watch.release()
            with tempfile.TemporaryDirectory() as folder:
                folders = _saved(make_model(model_name, shapes), Path(folder))
                for name, L in names.items():
                    yield from _case(name, folders, L, watch, rounds)


def _case(name: str, folders: dict[str, Path], L: int, watch: Watch, rounds: int) -> Iterator[Case]:
    ours = [FirstToken(who, folder, "mixtura", L) for who, folder in folders.items()]
    stock = [FirstToken(f"transformers {n}", folders["mixtura"], n, L) for n in ("grouped_mm", "eager")]
    everybody = [*ours, *stock]
    outcome = interleave(everybody, watch, rounds=rounds)
    peaks = {one.who: Timing.of(one.gigabytes) for one in everybody if one.who in outcome.timings}
    yield Case(f"{name}/first token", outcome, "s")
    yield Case(f"{name}/peak", Outcome(peaks, outcome.failed, outcome.foreign), "GB")


class FirstToken:
    """A contestant each of whose runs is a process.

    Args:
        who: its name.
        folder: of the model.
        how: experts are computed; see ``first_token``.
        length: of the prompt.

    Attributes:
        gigabytes: at the peak of each run so far.
    """

    def __init__(self, who: str, folder: Path, how: str, length: int) -> None:
        self.who, self.gigabytes = who, list[float]()
        words = [str(folder), how, str(length), str(torch.get_num_threads())]
        self._command = [sys.executable, "-m", "mixtura.bench.first_token", *words]

    def run(self, times: int, clock: str = "wall") -> list[float]:
        """Seconds of each of so many runs."""
        told = [self._once(clock) for _ in range(times)]
        self.gigabytes += [one["gigabytes"] for one in told]
        return [one["seconds"] for one in told]

    def _once(self, clock: str) -> dict[str, float]:
        done = subprocess.run([*self._command, clock], check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["without a word"])[-1])
        told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return told


def _saved(model: Any, folder: Path) -> dict[str, Path]:
    """Folders by contestant."""
    model.save_pretrained(folder / "all")
    folders = {"mixtura": folder / "all"}
    for who, bits in FEW_BITS.items():
        folders[who] = folder / str(bits)
        quantize_model(copy.deepcopy(model), bits=bits, linears=True).save_pretrained(folders[who])
    return folders
