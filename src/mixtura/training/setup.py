"""From a recipe to a ready Trainer: arguments, optimizer, schedule."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, TrainingArguments, get_scheduler
from transformers.utils import logging

from mixtura.core.errors import MixturaWarning, OptionError
from mixtura.hf import mixtures
from mixtura.hf.callbacks import CompleteMark, ProgressBar
from mixtura.training.parameters import router_parameters
from mixtura.training.recipe import Recipe, TrainRecipe
from mixtura.training.trainer import MixtureTrainer


def build_trainer(
    recipe: Recipe, model: Any, trained: Mapping[str, nn.Parameter], sequences: Any, folder: Path, *, progress: bool
) -> MixtureTrainer:
    """Trainer of the recipe.

    Args:
        recipe: what to do.
        model: whose parameters ``trained`` require a gradient.
        trained: by name; kept in float32.
        sequences: as many as the run reads, in their order.
        folder: of the checkpoints.
        progress: whether a bar is shown.

    Raises:
        OptionError: if nothing is trained, trained parameters are not float32, balance terms have no mixtures, or there
            are several processes.
    """
    _check(recipe, model, trained)
    if recipe.train.precision == "bfloat16":
        _warn_if_slow()
    optimizer = _optimizer(recipe.train, model, trained)
    names = {"cosine": "cosine", "constant": "constant_with_warmup"}
    schedule = get_scheduler(names[recipe.train.schedule], optimizer, recipe.train.warmup, recipe.train.steps)
    trainer = MixtureTrainer(
        model=model,
        args=_arguments(recipe, folder),
        train_dataset=sequences,
        optimizers=(optimizer, schedule),
        callbacks=[CompleteMark(), *([ProgressBar()] if progress else [])],
        balance=recipe.balance,
        statistic=recipe.balance_statistic,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.args.world_size > 1:
        raise OptionError(f"training runs in one process, got {trainer.args.world_size}")
    return trainer


def _check(recipe: Recipe, model: Any, trained: Mapping[str, nn.Parameter]) -> None:
    if not trained:
        raise OptionError(f"nothing is left to train: train.parameters is {recipe.train.parameters!r}")
    if recipe.balance and not mixtures(model):
        raise OptionError(f"balance {sorted(recipe.balance)} needs mixtures, but {type(model).__name__} has none")
    for name, parameter in trained.items():
        if parameter.dtype != torch.float32:
            raise OptionError(f"{name} is {parameter.dtype}: small updates would be lost, load the model in float32")


def _warn_if_slow() -> None:
    """A processor that only imitates bfloat16 took eight times as long as in float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch that is supported
    known = [capabilities[name] for name in ("avx512_bf16", "amx_bf16") if name in capabilities]
    if known and not any(known) and not torch.cuda.is_available():
        warnings.warn(
            "train.precision is 'bfloat16', but this processor has no instructions for it and is far slower than in "
            "'float32'",
            MixturaWarning,
            stacklevel=4,
        )


def _optimizer(train: TrainRecipe, model: Any, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    routers = {id(parameter) for parameter in router_parameters(model)}
    gates = [p for p in trained.values() if id(p) in routers]
    matrices = [p for p in trained.values() if id(p) not in routers and p.ndim > 1]
    vectors = [p for p in trained.values() if id(p) not in routers and p.ndim <= 1]
    rate = train.learning_rate if train.router_learning_rate is None else train.router_learning_rate
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
        {"params": gates, "weight_decay": 0.0, "lr": rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=train.learning_rate, betas=(0.9, 0.95), fused=True)


def _arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    train, on_cpu = recipe.train, not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.gradient_accumulation,
        max_grad_norm=train.max_grad_norm,
        bf16=train.precision == "bfloat16",
        seed=recipe.seed,
        train_sampling_strategy="sequential",
        save_strategy="steps" if train.save_every else "no",
        save_steps=train.save_every or 1,
        save_total_limit=2,  # the older one stands until the newer one is whole
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        use_cpu=on_cpu,
        report_to="none",
        disable_tqdm=True,
    )


def release(trainer: MixtureTrainer) -> None:
    """Undo what accelerate did to the model's forward: outside of training it runs in its own precision."""
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Errors of transformers alone, and no bars of its own.

    A checkpoint without the frozen weights, which is what ours are, would be warned about at every resume.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
