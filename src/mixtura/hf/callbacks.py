"""Callbacks for transformers' Trainer: a progress bar, and the mark that makes a checkpoint whole."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from mixtura.core.files import write_file

MARK = "complete.json"


class ProgressBar(TrainerCallback):
    """One bar over the steps of the run, with the last loss; on standard error, and only on the first process.

    Args:
        title: what stands before the bar.
    """

    def __init__(self, title: str = "train") -> None:
        self.title = title
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where the run stands."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix(loss=f"{logs['loss']:.4f}")  # type: ignore[index]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar standing."""
        if self.bar is not None:
            self.bar.close()


class CompleteMark(TrainerCallback):
    """Writes ``complete.json`` into a checkpoint once everything else in it is on disk.

    Trainer writes checkpoints in place. A process that is killed on the way leaves one without the mark, or with files
    of another size than it says; ``newest_checkpoint`` passes over both.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Flush the checkpoint of this step and mark it; only on the first process."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sizes = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MARK):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sizes[str(path.relative_to(folder))] = path.stat().st_size
        with write_file(folder / MARK) as partial:
            partial.write_text(json.dumps(sizes), encoding="utf-8")


def is_complete(checkpoint: Path) -> bool:
    """Whether the checkpoint has its mark, and every file has the size that the mark says."""
    try:
        sizes = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in a folder of Trainer's, or None."""
    whole = [path for path in checkpoints(folder) if is_complete(path)]
    return whole[-1] if whole else None


def checkpoints(folder: Path) -> list[Path]:
    """The folders ``checkpoint-<step>``, complete or not, by step; nothing else that lies there."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.rpartition("-")[2]))
