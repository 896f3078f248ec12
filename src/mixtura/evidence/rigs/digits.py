"""R-DIG: scikit-learn's digits and a tiny vision transformer whose feed-forward layers are what an arm says.

1797 images of 8 x 8, 16 patches of 2 x 2, D 64, 4 blocks; 1200 images to learn from, 237 to choose a rate, 360 to
measure on, the same for all. Layers are described as in ``language``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mixtura.core.routing import Routing, counts, violation
from mixtura.evidence.rigs.language import DIM, Block, decided, feed_forward, start
from mixtura.evidence.rigs.language_training import filled, schedule
from mixtura.hf.balance import Balancer
from mixtura.nn.state import RouterState, use_state

BLOCKS, PATCHES, BATCH, EPOCHS = 4, 16, 64, 40
PARTS = [1200, 237, 360]  # images to learn from, to choose by, to measure on
ERROR, CHOOSING = "test error, %", "validation error, %"


@functools.cache
def images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Patches (N, 16, 4) from 0 to 1, and digits (N,), of each part."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32) / 16
    patches = pixels.view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, PATCHES, 4)
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    digits = torch.tensor(data.target)
    return [(patches[rows], digits[rows]) for rows in torch.split(order, PARTS)]


class VisionTransformer(nn.Module):
    """Patches to logits of ten digits, from the mean over patches."""

    def __init__(self, layer: Mapping[str, Any]) -> None:
        super().__init__()
        self.patches, self.places = nn.Linear(4, DIM), nn.Parameter(torch.zeros(PATCHES, DIM))
        layers = [feed_forward(layer, str(number)) for number in range(BLOCKS)]
        self.blocks = nn.ModuleList(Block(part, causal=False) for part in layers)
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, 10)
        start(self)

    def forward(self, patches_BQP: torch.Tensor) -> tuple[torch.Tensor, RouterState]:
        """Logits (B, 10), and what the routers decided."""
        state = RouterState(rows=len(patches_BQP))
        hidden_BQD = self.patches(patches_BQP) + self.places
        with use_state(state):
            for block in self.blocks:
                hidden_BQD = block(hidden_BQD)
        return self.head(self.norm(hidden_BQD).mean(1)), state


def fit(
    *,
    seed: int,
    layer: Mapping[str, Any],
    lr: float,
    epochs: int = EPOCHS,
    balance: Mapping[str, Any] | None = None,
) -> VisionTransformer:
    """Train a model; runs of one seed see the images in the same order.

    Args:
        seed: of weights and order.
        layer: see ``language``.
        lr: highest rate, on the schedule of ``language_training``.
        epochs: over 1200 images.
        balance: terms, see ``Balancer``.
    """
    torch.manual_seed(seed)
    model, (patches, digits) = VisionTransformer(layer).train(), images()[0]
    generator = torch.Generator().manual_seed(1000 + seed)
    orders = [torch.randperm(len(digits), generator=generator) for _ in range(epochs)]
    batches = [rows for order in orders for rows in torch.split(order, BATCH)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, fused=True)
    balancer = Balancer(model, balance or {}, "micro-batch-load")
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, len(batches))
        balancer.begin_step(len(rows) * PATCHES)
        logits, state = model(patches[rows])
        torch.autograd.backward(F.cross_entropy(logits, digits[rows]) + balancer.loss([state])[0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balancer.end_step()
    return model.eval()


@torch.no_grad()
def train(**config: Any) -> dict[str, float]:
    """``fit``, and figures on the images that were held out."""
    with torch.enable_grad():
        model = fit(**config)
    torch.manual_seed(0)  # of routers that draw
    errors = []
    routings: list[Routing] = []
    for patches, digits in images()[1:]:
        logits, state = model(patches)
        errors.append(100 * float((logits.argmax(-1) != digits).float().mean()))
        routings = decided(state)
    total = sum(parameter.numel() for parameter in model.parameters())
    loads = [counts(routing).float() / counts(routing).sum() for routing in routings]
    return {
        ERROR: errors[1],
        CHOOSING: errors[0],
        "MaxVio": max((violation(load) for load in loads), default=0.0),
        "slots a token": filled(routings),
        "total parameters": total,
        "memory bytes": 16 * total,  # weights, gradients, and the optimizer's two moments
    }
