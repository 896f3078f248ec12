"""``Balanced``: what makes the balance losses of any trainer of transformers exact; also those of TRL.

class BalancedSFT(Balanced, SFTTrainer): ...
BalancedSFT(model, args=..., train_dataset=..., balance={"load-balancing": 0.01})
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from mixtura.core.errors import FileFormatError, MixturaWarning, OptionError
from mixtura.core.files import write_file
from mixtura.hf import record
from mixtura.hf.balance import DEFAULT_STATISTIC, Balancer, Terms, constant_routers

STATE = "balance.json"


class Balanced:
    """Adds balance terms to the loss of a trainer; put it before the trainer's class.

    The terms are scaled by the routed tokens of the whole optimizer step, over micro-batches and processes; see
    ``Balancer``. Forward calls without gradient, as of a reference model, are not counted. Routers that balance
    themselves are told after every step.

    Args:
        balance: coefficient by key of a balance method; see ``Balancer``.
        statistic: key of the load that a load-balancing term sees.

    Raises:
        OptionError: if one process drives several devices (DataParallel).
    """

    def __init__(
        self, *args: Any, balance: Terms | None = None, statistic: str = DEFAULT_STATISTIC, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:  # type: ignore[attr-defined]
            raise OptionError("DataParallel splits a call over devices; start one process for each of them (torchrun)")
        self.balancer = Balancer(self.model, balance or {}, statistic)  # type: ignore[attr-defined]
        self.parts: dict[str, float] = {}
        self.add_callback(_EndOfStep(self.balancer))  # type: ignore[attr-defined]

    def routed_tokens(self, batch: Mapping[str, Any]) -> torch.Tensor | int:
        """Real tokens of a micro-batch as the model will see them: of its attention masks, else of its ids."""
        masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
        if masks:
            return sum(mask.sum() for mask in masks)
        return sum(value.numel() for name, value in batch.items() if name.endswith("input_ids"))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of one step; their routed tokens are announced to the balancer."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self.parts = {}
        self.balancer.begin_step(sum(self.routed_tokens(batch) for batch in batches))
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss, and in training the share of this micro-batch in the balance terms of the step."""
        with record(model) as states:
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not model.training:
            return result
        loss = result[0] if return_outputs else result
        balance, parts = self.balancer.loss(states)
        self.add_parts({name: value.item() for name, value in parts.items()})
        loss = loss + balance.to(loss.device) * self._undone(num_items_in_batch)
        return (loss, result[1]) if return_outputs else loss

    def add_parts(self, parts: Mapping[str, float]) -> None:
        """Add to the parts of the loss of this step, of this process."""
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value

    def _undone(self, num_items_in_batch: Any) -> float:
        """What the trainer will divide by: processes, and micro-batches unless the loss is scaled already."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[attr-defined]
            scaled = counted or self.compute_loss_func is not None  # type: ignore[attr-defined]
        world = self.accelerator.num_processes  # type: ignore[attr-defined]
        return float(world * (1 if scaled else self.current_gradient_accumulation_steps))  # type: ignore[attr-defined]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        if self.args.should_save:  # type: ignore[attr-defined]
            folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
            with write_file(folder / STATE) as partial:
                partial.write_text(json.dumps(self.balancer.state_dict()), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        path = Path(resume_from_checkpoint) / STATE
        try:
            self.balancer.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise FileFormatError(f"checkpoint {str(path.parent)!r} has no readable {STATE}: {error}") from None


class _EndOfStep(TrainerCallback):
    """Checks and ends the step of a balancer, and warns once of routers that learn nothing."""

    def __init__(self, balancer: Balancer) -> None:
        self.balancer = balancer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn of top-1 routers whose weight is constant and that no term trains."""
        layers = constant_routers(self.balancer.model)
        if layers and not self.balancer.terms:
            warnings.warn(
                f"the routers of layers {', '.join(layers)} choose one expert and renormalize its weight to 1: they "
                "get no gradient from the loss, and no balance term trains them; use renormalize=None or k >= 2, or "
                "freeze them",
                MixturaWarning,
                stacklevel=2,
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a step whose tokens were announced wrongly."""
        self.balancer.check_tokens()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has made its step."""
        self.balancer.end_step()
