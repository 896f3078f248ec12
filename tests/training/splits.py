"""One optimizer step, split in different ways: the gradient of a gate, and what was logged. As a program: one rank.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=12345 python splits.py OUT
writes <accumulation>.safetensors for each accumulation of ACCUMULATIONS, from rank 0.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainingArguments

from mixtura.hf import convert
from mixtura.nn import Experts, Mixture
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.training.trainer import MixtureTrainer
from pico import pico

LENGTHS = (5, 16, 9, 12, 3, 16, 7, 14)  # eight rows are one step
ACCUMULATIONS = (1, 2)
TERMS = {"load-balancing": 1.0, "router-z-loss": 0.1}


def rows():
    """Eight rows of unequal lengths, twice, for two steps; the first half of each row's labels is masked."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for n in LENGTHS * 2:
        ids = torch.randint(3, 64, (n,), generator=generator)
        made.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(n) < n // 2, -100)})
    return made


def collate(batch):
    """Pad on the right, up to the longest row of the micro-batch."""
    width = max(len(row["input_ids"]) for row in batch)
    pad = lambda name, fill: torch.stack(
        [torch.nn.functional.pad(row[name], (0, width - len(row[name])), value=fill) for row in batch]
    )
    mask = torch.stack([torch.arange(width) < len(row["input_ids"]) for row in batch]).long()
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100), "attention_mask": mask}


class Gradients(TrainerCallback):
    """Keeps the gradients of the second step's end; in the first one the previous load is not yet known."""

    def __init__(self, model):
        self.model, self.kept = model, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.kept = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def own():
    model = pico("llama")
    return convert(model, {i: Mixture(TopKRouter(32, 4), Experts(4, 32, 16)) for i in (0, 2)})


def gradients(accumulation, make=own, statistic="previous-step-load", terms=TERMS):
    """Gradients by parameter of the second step, and its logged row; nothing is learned, the rate is 0."""
    model = make()
    kept = Gradients(model)
    world = int(os.environ.get("WORLD_SIZE", 1))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=2,
            per_device_train_batch_size=8 // accumulation // world,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.0,
            max_grad_norm=0.0,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
        )
        trainer = MixtureTrainer(
            model=model,
            args=args,
            train_dataset=rows(),
            data_collator=collate,
            callbacks=[kept],
            balance=terms,
            statistic=statistic,
        )
        trainer.train()
    return kept.kept, trainer.state.log_history[1]


def main(out):
    for accumulation in ACCUMULATIONS:
        kept, row = gradients(accumulation)
        if os.environ["RANK"] == "0":
            logged = {f"log.{k}": torch.tensor(v, dtype=torch.float64) for k, v in row.items()}
            save_file(kept | logged, Path(out) / f"{accumulation}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
