"""One forward and one backward call on random tokens: what gets a gradient, and which experts were chosen.

Every gradient is looked at when it is complete and dropped at once, so that one gradient is held at a time besides the
activations; gradients that were there before are put back. The model is in eval mode meanwhile. A gradient counts as 0
below 1e-8 of the model's largest: a weight divided by itself (a renormalized top-1 gate) leaves rounding of that size.

E experts, U units of a parameter: the experts that it stacks, or all of it as one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mixtura.core.routing import Routing, scatter_count
from mixtura.hf.forward import record
from mixtura.hf.losses import next_token_loss
from mixtura.hf.tensor_roles import TensorRole

ROWS, LENGTH = 2, 64
ROUNDING = 1e-8  # of a gradient, relative to the largest of the model


@dataclasses.dataclass(frozen=True)
class Probe:
    """What one backward call showed.

    Attributes:
        tokens: number of random tokens.
        loss: cross-entropy of the next token, in nats.
        live: by name of a trained parameter that was reached, its units (experts, or 0 for all) with a gradient.
        infinite: names of parameters whose gradient is not finite.
        largest_gradient: bytes of the largest gradient, what the probe held besides the activations.
        chosen_E: by layer, how many slots went to each expert.
        gate_reached: layers whose recorded logits have a path to trained parameters, so that a balance loss can act.
    """

    tokens: int
    loss: float
    live: dict[str, frozenset[int]]
    infinite: list[str]
    largest_gradient: int
    chosen_E: dict[str, list[int]]
    gate_reached: dict[str, bool]


def probe(model: Any, roles: Sequence[TensorRole]) -> Probe:
    """Run the model on random tokens, forward and backward; it stays as it was.

    Args:
        model: with weights; nothing needs to require a gradient.
        roles: of its parameters.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
    ids_BQ = torch.randint(0, vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    sizes_U: dict[str, torch.Tensor] = {}
    trained = [role for role in roles if role.tensor.requires_grad]
    with contextlib.ExitStack() as stack:
        for role in trained:
            stack.enter_context(_watched(role, sizes_U))
        stack.enter_context(_evaluating(model))
        stack.enter_context(torch.enable_grad())
        states = stack.enter_context(record(model))
        loss = next_token_loss(model(ids_BQ, use_cache=False).logits, ids_BQ)
        if loss.requires_grad:
            loss.backward()
    records = {item.layer: item.routing for state in states for item in state.tape.records}
    return Probe(
        tokens=ids_BQ.numel(),
        loss=loss.item(),
        live=_live(trained, sizes_U),
        infinite=[name for name, size_U in sizes_U.items() if not size_U.isfinite().all()],
        largest_gradient=max((role.tensor.nbytes for role in trained), default=0),
        chosen_E={layer: _chosen(routing) for layer, routing in records.items()},
        gate_reached={layer: routing.logits_TE.requires_grad for layer, routing in records.items()},
    )


def _live(trained: Sequence[TensorRole], sizes_U: dict[str, torch.Tensor]) -> dict[str, frozenset[int]]:
    least = ROUNDING * max((size_U.max().item() for size_U in sizes_U.values()), default=0.0)
    return {
        role.name: frozenset(
            unit for unit, size in zip(role.units, sizes_U[role.name].tolist(), strict=True) if size > least
        )
        for role in trained
        if role.name in sizes_U
    }


@contextlib.contextmanager
def _watched(role: TensorRole, sizes_U: dict[str, torch.Tensor]) -> Iterator[None]:
    """Note the largest entry of each unit's gradient as soon as it is there, and drop the gradient."""

    def look(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        units = len(role.units)
        sizes_U[role.name] = gradient.reshape(units, -1).abs().amax(1).float()

    before, role.tensor.grad = role.tensor.grad, None
    handle = role.tensor.register_post_accumulate_grad_hook(look)
    hooks = role.tensor._post_accumulate_grad_hooks
    others = {number: hooks.pop(number) for number in list(hooks) if number != handle.id}  # one may be an optimizer
    try:
        yield
    finally:
        handle.remove()
        hooks.update(others)
        role.tensor.grad = before


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _chosen(routing: Routing) -> list[int]:
    return [int(count) for count in scatter_count(routing).sum(0)[: routing.num_experts]]
