"""transformers' Trainer with next-token loss, balance terms from the tape, and checkpoints of what is trained alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import Trainer

from mixtura.core.errors import FileFormatError, MixturaError
from mixtura.hf import record
from mixtura.hf.losses import IGNORED, balance_loss, next_token_loss

WEIGHTS = "model.safetensors"  # the name under which Trainer looks for weights when it resumes


class MixtureTrainer(Trainer):
    """Trains a causal language model, with mixtures or without.

    The loss of a step is the cross-entropy per predicted token of the whole step, exact under accumulation, plus the
    balance terms, summed over the layers and averaged over the micro-batches; see ``balance_loss`` for what that
    average leaves open. A row of the log has the loss of its step alone and every part of it, so a resumed run logs the
    same rows.

    Args:
        terms: coefficient by key of a balance method.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, terms: Mapping[str, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.terms = terms
        self.parts: dict[str, float] = {}

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step, and how many tokens they predict."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.parts = {}
        return batches, sum(batch["labels"][:, 1:].ne(IGNORED).sum() for batch in batches)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Share of this micro-batch in the loss of the step.

        Raises:
            MixturaError: if it is not finite.
        """
        labels_BQ = inputs["labels"]
        with record(model) as states:
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
        cross_entropy = next_token_loss(outputs.logits, labels_BQ, num_items_in_batch)
        balance, parts = balance_loss(states, self.terms)
        share = 1 / self.current_gradient_accumulation_steps
        loss = cross_entropy + balance.to(cross_entropy.device) * share
        self._add_parts({"loss": loss.detach(), "cross_entropy": cross_entropy.detach()}, 1.0)
        self._add_parts(parts, share)
        if not loss.isfinite():
            raise MixturaError(f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower learning_rate")
        return (loss, outputs) if return_outputs else loss

    def _add_parts(self, parts: Mapping[str, torch.Tensor], share: float) -> None:
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value.item() * share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a row with every part of the loss of its step."""
        super().log({**logs, **self.parts} if "loss" in logs else logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write trained parameters and buffers, by their names in memory; neither frozen weights nor optimizer."""
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
