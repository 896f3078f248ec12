"""What every surgery on a whole model shares: its result, the comparison with before, and which layers it means."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mixtura.core.errors import MixturaError, NotExpressibleError, OptionError
from mixtura.core.layers import chosen_layers
from mixtura.nn.mixture import Mixture

TOLERANCE = 1e-4  # of logits in float32
ROUNDINGS = 16  # of logits in half precision, in units of the type's precision


class Operated(NamedTuple):
    """A model after a surgery, and its receipt.

    Attributes:
        model: shares its other weights with the model before, which must not be used any more.
        receipt: plain JSON.
    """

    model: Any
    receipt: dict[str, Any]


class Before:
    """A model before a surgery: its logits, and its sizes.

    Args:
        model: causal language model.
        tokens_BQ: token ids that the logits are compared on; None is 2 x 64 drawn ones.

    Raises:
        OptionError: if the tokens are no ids of the model.
    """

    def __init__(self, model: Any, tokens_BQ: torch.Tensor | None = None) -> None:
        from mixtura.hf.count import count_parameters

        drawn = tokens_BQ is None
        self.tokens_BQ = _drawn(model) if drawn else _checked(tokens_BQ, model.config.vocab_size)  # type: ignore[arg-type]
        self.logits, self.counts = _logits(model, self.tokens_BQ), count_parameters(model)

    def compare(self, model: Any, method: str, *, preserves: bool) -> dict[str, Any]:
        """The part of a receipt that says what changed.

        Args:
            model: after the surgery.
            method: its name, for errors.
            preserves: whether it promised equal logits.

        Raises:
            MixturaError: if logits are not finite, or differ by more than rounding although that was promised.
        """
        from mixtura.hf.count import count_parameters

        difference = float((_logits(model, self.tokens_BQ).float() - self.logits.float()).abs().max())
        self._check(method, difference, preserves)
        after = count_parameters(model)
        return {
            "preserves_the_function": preserves,
            "max_logit_difference": difference,
            "bit_equal": difference == 0,
            "dtype": str(self.logits.dtype).removeprefix("torch."),
            "tokens_checked": self.tokens_BQ.numel(),
            "parameters": {"before": self.counts.total, "after": after.total},
            "active_parameters": {"before": self.counts.active, "after": after.active},
            "versions": {name: importlib.metadata.version(name) for name in ("mixtura", "transformers", "torch")},
        }

    def _check(self, method: str, difference: float, preserves: bool) -> None:
        if not math.isfinite(difference):
            raise MixturaError(f"the logits after {method} are not finite")
        precision = max(TOLERANCE, ROUNDINGS * torch.finfo(self.logits.dtype).eps)
        if preserves and difference > precision * max(1.0, float(self.logits.abs().max())):
            raise MixturaError(
                f"{method} promised equal logits, but they differ by {difference:.2e} on {self.tokens_BQ.numel()} "
                "tokens; this is a bug, please report it with the receipt"
            )


def mixture_layers(model: Any, layers: str | Sequence[int]) -> dict[int, Mixture]:
    """The mixtures of ours that are meant, by layer.

    Args:
        model: of the family mixtura.
        layers: "all" mixtures, or layers as ``upcycle`` names them.

    Raises:
        NotExpressibleError: if the model is not of the family.
        OptionError: if a layer does not exist, or is no mixture.
    """
    from mixtura.hf.modeling import MixturaModel, mixtures

    if not isinstance(model, MixturaModel):
        raise NotExpressibleError(
            f"{type(model).__name__} is no model of the family mixtura, without adapters around it"
        )
    there = {int(layer): mixture for layer, mixture in mixtures(model).items()}
    if layers == "all":
        return there
    chosen = chosen_layers(layers, model.config.num_hidden_layers)
    if dense := [layer for layer in chosen if layer not in there]:
        raise OptionError(f"layers must be mixtures, which are {sorted(there)}, got {dense[0]}")
    return {layer: there[layer] for layer in chosen}


def _drawn(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (2, 64), generator=generator)


def _checked(tokens_BQ: torch.Tensor, vocabulary: int) -> torch.Tensor:
    if tokens_BQ.ndim != 2 or tokens_BQ.is_floating_point() or not tokens_BQ.numel():
        raise OptionError(f"tokens_BQ must be token ids (B, Q), got {tokens_BQ.dtype} of {tuple(tokens_BQ.shape)}")
    low, high = int(tokens_BQ.min()), int(tokens_BQ.max())
    if low < 0 or high >= vocabulary:
        raise OptionError(f"tokens_BQ must lie in 0 .. {vocabulary - 1}, got {low} .. {high}")
    return tokens_BQ


@torch.no_grad()
def _logits(model: Any, tokens_BQ: torch.Tensor) -> torch.Tensor:
    training = model.training
    logits = model.eval()(tokens_BQ.to(model.device), use_cache=False).logits
    model.train(training)
    return logits  # type: ignore[no-any-return]
