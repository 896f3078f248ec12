"""``train``: from a recipe to a trained model in a folder, through transformers' Trainer.

Checkpoints stand in ``<out>.checkpoints`` until ``out`` is whole, and hold what is trained alone. A run that was
killed, even in the middle of a checkpoint, goes on from the newest complete one to the same losses. One process at a
time works in that folder, and removes nothing there that no run has written. Weights are safetensors; optimizer,
schedule and random states are Trainer's own files, which it reads with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mixtura.core.errors import MixturaError, OptionError
from mixtura.core.files import PARTIAL, check_new_folder, hold_folder, os_errors
from mixtura.training.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
        model: the trained model, in eval mode, on the device it was trained on.
        tokenizer: its tokenizer.
        path: the folder it was saved to.
        history: (step, cross-entropy in nats a token) by ``log_every``, from step 1, also of a resumed run.
        rows: every logged row, with each balance term (mean over the layers), learning rate and gradient norm.
        tokens_trained: tokens read over the whole run.
        seconds: that this call took.
        resumed_from: step of the checkpoint this call went on from; 0 for none.
    """

    model: Any
    tokenizer: Any
    path: Path
    history: list[tuple[int, float]]
    rows: list[dict[str, float]]
    tokens_trained: int
    seconds: float
    resumed_from: int


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    model: Any = None,
    tokenizer: Any = None,
    corpus: Any = None,
    receipts: Mapping[str, Any] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Train and save.

    The loss of a step is the same however ``train.gradient_accumulation`` splits it, balance terms included (see
    ``mixtura.training.balanced``). A recipe runs in one process; ``MixtureTrainer`` itself can run in several.

    Args:
        recipe: what to do.
        out: new or empty folder for the model.
        model: to start from, instead of what ``recipe.model`` and ``recipe.upcycle`` would give; it is trained in
            place.
        tokenizer: of that model.
        corpus: instead of loading the recipe's domains.
        receipts: of what made ``model``, by step; for the card.
        resume: whether to go on from the newest complete checkpoint of the same run; False starts over.
        progress: whether a bar is shown on standard error.

    Raises:
        OptionError: if ``out`` exists or cannot be written, the checkpoints are of another run, or the recipe does not
            fit the model.
        MixturaError: if another process trains into ``out``, the disk is full (the last complete checkpoint stays) or
            the loss is not finite.
    """
    from mixtura.hf.save import save_model
    from mixtura.training.parameters import freeze_all_but
    from mixtura.training.sequences import Sequences
    from mixtura.training.setup import build_trainer, quiet, release
    from mixtura.training.start import starting_point

    started, out = time.perf_counter(), Path(out)
    check_new_folder(out)
    checkpoints = _folder_of_checkpoints(out)
    with hold_folder(checkpoints):
        if model is None:
            model, tokenizer, receipts = starting_point(recipe)
        trained = freeze_all_but(model, recipe.train)
        sequences = Sequences.of(recipe, tokenizer, corpus)
        with _full_disk_named(checkpoints), quiet():
            trainer = build_trainer(recipe, model, trained, sequences, checkpoints, progress=progress)
            checkpoint = _checkpoint(recipe, model, sequences, checkpoints, resume=resume)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            release(trainer)
            rows = [row for row in trainer.state.log_history if "loss" in row]
            save_model(
                model,
                out,
                tokenizer=tokenizer,
                parents=(recipe.model,),
                receipts=receipts,
                recipe=recipe.to_dict(),
                numbers=_numbers(recipe, rows, trained),
                command=f"mixtura train recipe.yaml {shlex.quote(out.name)}",
            )
        _clear(checkpoints)
    history = [(int(row["step"]), row["cross_entropy"]) for row in rows]
    seconds = time.perf_counter() - started
    step = 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))
    return TrainResult(model.eval(), tokenizer, out, history, rows, recipe.training_tokens, seconds, step)


def _folder_of_checkpoints(out: Path) -> Path:
    """``<out>.checkpoints``, beside the real folder where ``out`` is a link.

    Raises:
        OptionError: if that name is too long.
    """
    real = Path(os.path.realpath(out))
    folder = real.with_name(real.name + ".checkpoints")
    try:
        os.lstat(folder)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise OptionError(
                f"out has too long a name for a folder of checkpoints beside it: {str(folder)!r}"
            ) from None
    return folder


def _checkpoint(recipe: Recipe, model: Any, sequences: Any, folder: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from; what is half-written is removed."""
    from mixtura.hf.callbacks import checkpoints, is_complete, newest_checkpoint
    from mixtura.training.identity import NOTE, check_same_run
    from mixtura.training.trainer import check_state

    if not (folder / NOTE).exists() and checkpoints(folder):
        raise OptionError(f"{str(folder)!r} holds checkpoints that no run of mixtura has written; move them away")
    if not resume:
        _clear(folder)
    check_same_run(folder, recipe, model, sequences)
    for path in checkpoints(folder):
        if not is_complete(path):
            shutil.rmtree(path)
    found = newest_checkpoint(folder)
    if found is not None:
        check_state(model, found)
    return found


def _clear(folder: Path) -> None:
    """Remove what runs have written; the note goes last, so that a folder half cleared is still known as theirs."""
    from mixtura.hf.callbacks import checkpoints
    from mixtura.training.identity import NOTE

    for path in (*checkpoints(folder), *folder.glob(f"{PARTIAL}*")):
        shutil.rmtree(path, ignore_errors=True)
    (folder / NOTE).unlink(missing_ok=True)


def _numbers(recipe: Recipe, rows: list[dict[str, float]], trained: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "steps": recipe.train.steps,
        "tokens read": recipe.training_tokens,
        "trained parameters": sum(parameter.numel() for parameter in trained.values()),
    }
    if rows:
        numbers |= {
            f"cross-entropy at step {row['step']}": round(row["cross_entropy"], 4) for row in (rows[0], rows[-1])
        }
    return numbers


@contextlib.contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    """Turn a failed write into one line, and remove the half-written checkpoint."""
    from mixtura.hf.callbacks import checkpoints, is_complete, newest_checkpoint

    try:
        with os_errors():
            yield
    except (OSError, RuntimeError) as error:
        if not _is_failed_write(error):
            raise
        for path in checkpoints(folder):
            if not is_complete(path):
                shutil.rmtree(path, ignore_errors=True)
        last = newest_checkpoint(folder)
        if last is None:
            _clear(folder)
        kept = "there is no complete checkpoint yet" if last is None else f"{last.name} is complete"
        raise MixturaError(
            f"could not write beside {str(folder)!r}, the disk is full ({error}); {kept}: free space and run again"
        ) from error


def _is_failed_write(error: BaseException) -> bool:
    """No space left, a quota or a limit; torch's archive writer loses which and names a line of its source instead."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "inline_container" in str(
        error
    )
