"""The tour: one complete way through mixtura, on a real model and real text.

    fetch, evaluate, train a dense baseline, upcycle, train the mixture, evaluate, see, reload, export, generate

Both arms read the same tokens in the same order, and a token passes as many parameters in one as in the other (the
mixture has its routers beside). What was killed goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixtura.core.errors import OptionError
from mixtura.core.files import write_file

LAYERS = 6  # the last ones
UPCYCLE = {"copies": 4, "shards": 1, "k": 1, "shared": 0.5}
DATA = {"sequence_length": 256, "held_out_tokens": 1536}
TRAIN = {
    "steps": 32,
    "batch_size": 4,
    "learning_rate": 4e-4,
    "warmup": 3,
    "precision": "float32",
    "save_every": 16,
}
PROMPTS = ("def fibonacci(n):", "Der Befehl", "Shall I compare thee")
VERSIONS = ("mixtura", "torch", "transformers", "numpy", "safetensors", "tokenizers")


@dataclasses.dataclass
class Tour:
    """What the steps of one tour share.

    Attributes:
        out: folder of everything that is written.
        model: name or path of the dense model.
        steps: training steps of each arm.
        progress: whether bars and step names are shown.
        seconds: by step.
    """

    out: Path
    model: str
    steps: int
    progress: bool
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Name the step on standard error and take its time."""
        if self.progress:
            print(f"[{name}]", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - started, 1)


def run_tour(
    out: str | Path, *, model: str = "smollm2-135m", steps: int | None = None, progress: bool = True
) -> dict[str, Any]:
    """Run the tour; see the head of the file.

    Args:
        out: folder for models, report and summary; what a finished tour left there is replaced.
        model: dense model to start from, as ``load_model`` takes it.
        steps: training steps of each arm; None is the recipe's.
        progress: whether bars and step names are shown on standard error.

    Returns:
        The summary, which is also written as ``summary.json``.

    Raises:
        OptionError: if ``out`` holds something that is no tour, or ``steps`` is below 1.
    """
    from mixtura.tour_steps import compare_arms, export_and_reload, show_routing

    steps = int(TRAIN["steps"]) if steps is None else steps
    if steps < 1:
        raise OptionError(f"steps must be at least 1, got {steps}")
    tour = Tour(Path(out), model, steps, progress)
    _open(tour)
    arms = compare_arms(tour)
    seen = show_routing(tour, arms)
    checked = export_and_reload(tour, arms)
    return _close(tour, arms, seen, checked)


def _open(tour: Tour) -> None:
    """Take up the folder: go on with the same tour, replace a finished or different one, refuse anything else."""
    mark = tour.out / "tour.json"
    own = {"model": tour.model, "steps": tour.steps}
    if tour.out.is_dir() and any(tour.out.iterdir()) and not mark.is_file():
        raise OptionError(
            f"out must be a new folder or that of a former tour, but {str(tour.out)!r} holds other things"
        )
    if mark.is_file() and ((tour.out / "summary.json").exists() or json.loads(mark.read_text()) != own):
        _remove_former(tour.out)
    tour.out.mkdir(parents=True, exist_ok=True)
    with write_file(mark) as partial:
        partial.write_text(json.dumps(own), encoding="utf-8")


def _remove_former(out: Path) -> None:
    """Remove what a tour writes, and nothing that somebody has put beside it."""
    for name in ("dense", "mixture", "dense.checkpoints", "mixture.checkpoints", "export"):
        shutil.rmtree(out / name, ignore_errors=True)
    files = ("dense.history.json", "mixture.history.json", "trace.safetensors", "logits.safetensors")
    for name in (*files, "report.html", "summary.json", "tour.json"):
        (out / name).unlink(missing_ok=True)


def _close(tour: Tour, arms: Any, seen: Mapping[str, Any], checked: Mapping[str, Any]) -> dict[str, Any]:
    from mixtura.traces.report import write_report

    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    receipts = {"upcycle": arms.receipt, **checked["receipts"]}
    with tour.step("report"):
        report = write_report(
            tour.out / "report.html",
            trace=seen["trace"],
            tokenizer=arms.tokenizer,
            table=arms.bits_per_byte,
            curves=arms.curves,
            recipe=arms.recipe,
            versions=versions,
            notes=_notes(arms, checked),
            receipts=receipts,
        )
    written = ("dense", "mixture", "export", "trace.safetensors")
    paths = {name: str(tour.out / name) for name in written if (tour.out / name).exists()}
    summary = {
        "bits_per_byte": arms.bits_per_byte,
        "active_parameters": arms.active,
        "parameters": arms.total,
        "tokens_trained": arms.tokens_trained,
        "seconds": tour.seconds,
        "peak_rss_mb": peak_rss_mb(),
        "receipts": receipts,
        "skipped_domains": arms.skipped,
        "samples": checked["samples"],
        "paths": {**paths, "report": str(report)},
        "versions": versions,
    }
    with write_file(tour.out / "summary.json") as partial:
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _notes(arms: Any, checked: Mapping[str, Any]) -> list[str]:
    active = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in arms.active.items())
    notes = [
        f"Parameters that work on a token: {active}. Both arms read the same {arms.tokens_trained:,} tokens.",
        "One run with one seed: differences of a few thousandths of a bit are within what another seed would change.",
    ]
    notes += [f"Without {name}: {reason}" for name, reason in arms.skipped.items()]
    return notes + [f"{prompt} ... {text.strip()}" for prompt, text in checked["samples"].items()]


def peak_rss_mb() -> int:
    """Largest resident memory of this process so far, in MB of 10^6 bytes."""
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6)


def table(summary: Mapping[str, Any]) -> str:
    """The summary as lines for people."""
    bits = summary["bits_per_byte"]
    lines = [f"{'bits per byte':14}" + "".join(f"{name:>10}" for name in bits)]
    for domain in bits["base"]:
        lines.append(f"{domain:14}" + "".join(f"{bits[name][domain]:10.4f}" for name in bits))
    lines.append(f"{'active (M)':14}" + "".join(f"{summary['active_parameters'][name] / 1e6:10.2f}" for name in bits))
    total = sum(summary["seconds"].values())
    lines.append(f"\n{total:.0f} s, at most {summary['peak_rss_mb']} MB of memory")
    return "\n".join([*lines, f"report: {summary['paths']['report']}"])
