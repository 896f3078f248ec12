"""transformers' Trainer with next-token loss, balance terms from the tape, and checkpoints of what is trained alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import Trainer

from mixtura.core.errors import FileFormatError, MixturaError
from mixtura.hf.losses import IGNORED, next_token_loss
from mixtura.nn.balance.statistic import sum_over_processes
from mixtura.training.balanced import Balanced

WEIGHTS = "model.safetensors"  # the name under which Trainer looks for weights when it resumes


class MixtureTrainer(Balanced, Trainer):
    """Trains a causal language model, with mixtures or without.

    The loss of a step is the cross-entropy per predicted token of the whole step plus the balance terms, summed over
    the layers; both are the same however the step is split into micro-batches and over processes, but for what
    ``statistic`` leaves open. A row of the log has the loss of its step alone and every part of it, so a resumed run
    logs the same rows. ``balance`` and ``statistic`` are arguments of ``Balanced``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=self._cross_entropy, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step, and how many tokens all processes predict in it."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(batch["labels"][:, 1:].ne(IGNORED).sum() for batch in batches)
        return batches, sum_over_processes(torch.as_tensor(count, device=device))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Share of this micro-batch in the loss of the step.

        Raises:
            MixturaError: if it is not finite.
        """
        inputs = {**inputs, "use_cache": False}
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        self.add_parts({"loss": loss.item() / self.accelerator.num_processes})
        if not loss.isfinite():
            raise MixturaError(f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower learning_rate")
        return result

    def _cross_entropy(self, outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = next_token_loss(outputs.logits, labels, num_items_in_batch)
        self.add_parts({"cross_entropy": loss.item()})
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a row with every part of the loss of its step, over all processes."""
        if "loss" in logs:
            values = sum_over_processes(torch.tensor([*self.parts.values()], dtype=torch.float64))
            logs = {**logs, **dict(zip(self.parts, values.tolist(), strict=True))}
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write trained parameters and buffers, by their names in memory; neither frozen weights nor optimizer."""
        if not self.args.should_save:  # another process writes
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(trained_state(self.model), folder / WEIGHTS, metadata={"format": "pt"})


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that training may change: parameters that require a gradient, and persistent buffers."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
    return {name: value.contiguous() for name, value in (trained | buffers).items()}


def check_state(model: nn.Module, checkpoint: Path) -> None:
    """Raise ``FileFormatError`` unless a checkpoint has exactly what ``trained_state`` has; Trainer would only warn."""
    wanted = {name: tuple(value.shape) for name, value in trained_state(model).items()}
    try:
        with safetensors.safe_open(checkpoint / WEIGHTS, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  no dict
    except (OSError, safetensors.SafetensorError) as error:
        raise FileFormatError(f"checkpoint {str(checkpoint)!r} cannot be read: {error}") from None
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        raise FileFormatError(f"checkpoint {str(checkpoint)!r} does not fit the model, first at {differing[0]!r}")
