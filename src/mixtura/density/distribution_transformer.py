"""A network from a prior and data to the posterior, both Gaussian mixtures, for any prior of a family at once.

Every component of the prior is a token, every observation another. Blocks of a transformer let components look at each
other and at the data; nothing tells places in a list apart, so both are sets. What comes out moves each component:

    log w + delta,    m + L u,    factor L T        with N(m, L L') the component, T lower triangular, diag T = exp(.)

so weights sum to 1 and covariances are positive definite whatever the network says, and an untrained one, whose last
layer is 0, returns the prior. One data token is learned and always there: attention takes means, and would not see how
many observations there are.

Training draws a prior of the family, theta of the prior, data of theta, and lowers -log q(theta | prior, data): it
needs samples of the model, and none of a posterior. A posterior can be the next prior. Where observations are linear
with Gaussian noise, ``mixtura.density.kalman_update`` is exact; use that instead.

B problems, K components, D columns of theta, M observations of C columns, W width.

Source: Whittle, Ziomek, Rawling and Osborne, arXiv:2502.02463.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._checks import check_number, check_whole_number
from mixtura.density._parameters import cholesky_factors
from mixtura.density._tables import as_numpy
from mixtura.density.gaussian_mixture import GaussianMixture


class MixtureBatch(NamedTuple):
    """B Gaussian mixtures as tensors.

    Attributes:
        log_weights_BK: normalized.
        means_BKD: means.
        factors_BKDD: lower Cholesky factors of the covariances.
    """

    log_weights_BK: Tensor
    means_BKD: Tensor
    factors_BKDD: Tensor

    @classmethod
    def of(cls, mixture: Any) -> Self:
        """One fitted ``GaussianMixture`` without a noise component, in float32.

        Raises:
            OptionError: if a component has no weight.
        """
        if not (mixture.weights_ > 0).all() or mixture.noise_log_density_ is not None:
            raise OptionError("mixture must have weight in every component, and no noise component")
        parts = np.log(mixture.weights_), mixture.means_, cholesky_factors(mixture.covariances_)
        return cls(*(torch.as_tensor(part[None], dtype=torch.float32) for part in parts))

    def mixture(self, index: int = 0) -> GaussianMixture:
        """One of them as a fitted ``GaussianMixture``."""
        logs, means, factors = (part[index].detach().double().numpy() for part in self)
        weights = np.exp(logs - logs.max())
        return GaussianMixture.from_parameters(weights / weights.sum(), means, factors @ factors.swapaxes(1, 2))

    def log_prob(self, theta_BD: Tensor) -> Tensor:
        """Log density of one value under each, (B,)."""
        off_BKD1 = (theta_BD[:, None] - self.means_BKD)[..., None]
        white_BKD = torch.linalg.solve_triangular(self.factors_BKDD, off_BKD1, upper=False)[..., 0]
        log_det_BK = self.factors_BKDD.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * theta_BD.shape[1] * math.log(2 * math.pi)
        log_BK: Tensor = self.log_weights_BK - 0.5 * white_BKD.square().sum(-1) - log_det_BK - constant
        return log_BK.logsumexp(1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw of each, (B, D)."""
        B, _, D = self.means_BKD.shape
        component_B = torch.multinomial(self.log_weights_BK.exp(), 1, generator=generator)[:, 0]
        rows_B = torch.arange(B)
        noise_BD1 = torch.randn(B, D, 1, generator=generator)
        return self.means_BKD[rows_B, component_B] + (self.factors_BKDD[rows_B, component_B] @ noise_BD1)[..., 0]


class DistributionTransformer(nn.Module):
    """From a mixture and data to a mixture of as many components.

    Args:
        n_columns: D of theta.
        n_observed: C of an observation.
        width: W, a multiple of the heads.
        depth: blocks.
        heads: of attention.
    """

    def __init__(self, n_columns: int, n_observed: int, *, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.D, self.C = check_whole_number("n_columns", n_columns, 1), check_whole_number("n_observed", n_observed, 1)
        if check_whole_number("width", width, 1) % check_whole_number("heads", heads, 1):
            raise OptionError(f"width must be a multiple of heads={heads}, got {width}")
        n_triangle = self.D * (self.D + 1) // 2
        self.component = nn.Linear(1 + self.D + n_triangle, width)
        self.observation = nn.Sequential(nn.Linear(self.C, width), nn.SiLU(), nn.Linear(width, width))
        self.nothing = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(check_whole_number("depth", depth, 1)))
        self.head = nn.Linear(width, 1 + self.D + n_triangle)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, prior: MixtureBatch, data_BMC: Tensor) -> MixtureBatch:
        """Posteriors of priors (B of K components) given data (B, M, C); M may be 0.

        Raises:
            ShapeError: if the shapes do not fit.
        """
        B, _, D = prior.means_BKD.shape
        if D != self.D or data_BMC.ndim != 3 or data_BMC.shape[0] != B or data_BMC.shape[2] != self.C:
            found = f"{D} and {tuple(data_BMC.shape)}"
            raise ShapeError(f"prior must have {self.D} columns and data be (B={B}, M, {self.C}), got {found}")
        logs_BD = prior.factors_BKDD.diagonal(dim1=-2, dim2=-1).log()
        rows, columns = torch.tril_indices(D, D, -1)
        below = prior.factors_BKDD[..., rows, columns]
        tokens_BKW = self.component(torch.cat([prior.log_weights_BK[..., None], prior.means_BKD, logs_BD, below], -1))
        data_BMW = torch.cat([self.nothing.expand(B, 1, -1), self.observation(data_BMC)], 1)
        for block in self.blocks:
            tokens_BKW = block(tokens_BKW, data_BMW)
        delta, shift_BKD, stretch_BKD, lower = self.head(tokens_BKW).split([1, D, D, len(rows)], -1)
        turn_BKDD = torch.diag_embed(stretch_BKD.exp())
        turn_BKDD[..., rows, columns] = lower
        return MixtureBatch(
            (prior.log_weights_BK + delta[..., 0]).log_softmax(-1),
            prior.means_BKD + (prior.factors_BKDD @ shift_BKD[..., None])[..., 0],
            prior.factors_BKDD @ turn_BKDD,
        )

    def posterior(self, prior: Any, data: Any) -> GaussianMixture:
        """The posterior of one fitted mixture after observations (M, C), as a mixture."""
        data_MC = torch.as_tensor(np.asarray(as_numpy(data), dtype=np.float32))
        with torch.no_grad():
            found: MixtureBatch = self(MixtureBatch.of(prior), data_MC[None])
        return found.mixture()


class _Block(nn.Module):
    """Components look at each other, then at the data."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.each_other = nn.MultiheadAttention(width, heads, batch_first=True)
        self.at_data = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, tokens_BKW: Tensor, data_BMW: Tensor) -> Tensor:
        seen = self.norms[0](tokens_BKW)
        tokens_BKW = tokens_BKW + self.each_other(seen, seen, seen, need_weights=False)[0]
        seen = self.norms[1](tokens_BKW)
        tokens_BKW = tokens_BKW + self.at_data(seen, data_BMW, data_BMW, need_weights=False)[0]
        out: Tensor = tokens_BKW + self.feed_forward(self.norms[2](tokens_BKW))
        return out


Drawn = tuple[MixtureBatch, Tensor, Tensor]


def fit_transformer(
    model: DistributionTransformer, draw: Callable[[], Drawn], *, steps: int = 4000, lr: float = 1e-3
) -> list[float]:
    """Train on problems that are drawn anew at each step.

    Args:
        model: trained in place.
        draw: gives priors, theta (B, D) of each, and data (B, M, C) of each theta.
        steps: of Adam, with a learning rate that falls to 0 as a cosine.
        lr: learning rate.

    Returns:
        -log q(theta | prior, data) of every step, nats.

    Raises:
        OptionError: naming the argument.
    """
    optimizer = torch.optim.Adam(model.parameters(), check_number("lr", lr, 0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, check_whole_number("steps", steps, 1))
    losses = []
    for _ in range(steps):
        prior, theta_BD, data_BMC = draw()
        loss = -model(prior, data_BMC).log_prob(theta_BD).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses
