"""Marginals of discrete variables in one step: marginalization models (MaM).

Of variables of which some are unknown, one network says the log probability of those that are known, another the
conditional of each unknown one:

    x_S  ->  log p_theta(x_S)        x_S  ->  log p_phi(x_i | x_S) for all i

They are one model if, for every order of the variables and every step of it,

    log p_theta(x_before) + log p_phi(x_next | x_before) = log p_theta(x_before and next),    log p_theta(nothing) = 0

and training makes the squared difference small. From data, the conditionals come first (any-order autoregression), then
the marginals, which leave the conditionals as they are. From an unnormalized log density f there are no data:
REINFORCE lowers KL(p_theta || exp f / Z) on samples of the model, which are redrawn a few variables at a time.

Marginals are normalized only as far as the two agree; report ``consistency_gap`` beside a likelihood of them. The
published code anchors log p(nothing) at L ln 2 when it trains from f; here it is 0 throughout, so that marginals are
probabilities, and the mean of f - log p_theta over samples bounds log Z from below, tightly at the optimum.

N rows, L variables, K values; UNKNOWN stands for a value that is not known.

Source: Liu, Ramadge and Adams, arXiv:2310.12920.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._checks import check_number, check_whole_number

UNKNOWN = -1


class ValueNet(nn.Module):
    """A network of residual blocks over values that may be unknown.

    Args:
        n_variables: L.
        n_values: K.
        n_out: numbers that it says of a row.
        width: of hidden layers.
        depth: hidden layers.
    """

    def __init__(self, n_variables: int, n_values: int, n_out: int, *, width: int = 256, depth: int = 3) -> None:
        super().__init__()
        self.K = n_values
        self.first, self.last = nn.Linear(n_variables * (n_values + 1), width), nn.Linear(width, n_out)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))

    def forward(self, x_NL: Tensor) -> Tensor:
        """(N, n_out)"""
        hidden = F.silu(self.first(F.one_hot(x_NL + 1, self.K + 1).flatten(1).to(self.first.weight.dtype)))
        for block in self.blocks:
            hidden = hidden + F.silu(block(hidden))
        out: Tensor = self.last(hidden)
        return out


class MarginalizationModel(nn.Module):
    """Marginals and conditionals of L variables of K values.

    Args:
        n_variables: L.
        n_values: K.
        marginal: module from (N, L) values to (N, 1) log marginals; by default a ``ValueNet``.
        conditional: module from (N, L) values to (N, L * K) logits; by default a ``ValueNet``.
        random_state: seed of orders and samples. The networks are as torch's own seed has it.
    """

    def __init__(
        self,
        n_variables: int,
        n_values: int = 2,
        *,
        marginal: nn.Module | None = None,
        conditional: nn.Module | None = None,
        random_state: int = 0,
    ) -> None:
        super().__init__()
        self.L = check_whole_number("n_variables", n_variables, 1)
        self.K = check_whole_number("n_values", n_values, 2)
        self.marginal = ValueNet(self.L, self.K, 1) if marginal is None else marginal
        self.conditional = ValueNet(self.L, self.K, self.L * self.K) if conditional is None else conditional
        self.generator = torch.Generator().manual_seed(check_whole_number("random_state", random_state, 0))

    def check(self, x_NL: Tensor, *, complete: bool = False) -> Tensor:
        """Rows of values.

        Raises:
            ShapeError: if they have not L columns.
            OptionError: if a value is none of -1 (unknown) to K - 1; with ``complete`` also if it is unknown.
        """
        if x_NL.ndim != 2 or x_NL.shape[1] != self.L:
            raise ShapeError(f"x must be (N, {self.L}), got {tuple(x_NL.shape)}")
        low = 0 if complete else UNKNOWN
        if x_NL.is_floating_point() or (len(x_NL) and not low <= int(x_NL.min()) <= int(x_NL.max()) < self.K):
            raise OptionError(f"x must hold whole numbers from {low} to {self.K - 1}, got {x_NL.dtype} {x_NL[:1]}")
        return x_NL.long()

    def log_marginal(self, x_NL: Tensor) -> Tensor:
        """Log probability of the known variables of each row, (N,), in one pass; see ``check`` for what is raised."""
        return self._log_marginal(self.check(x_NL))

    def log_conditionals(self, x_NL: Tensor) -> Tensor:
        """Log probabilities of the values of each unknown variable given the known ones, (N, L, K)."""
        return self._log_conditionals(self.check(x_NL))

    def _log_marginal(self, x_NL: Tensor) -> Tensor:
        log_N1: Tensor = self.marginal(x_NL)
        return log_N1[:, 0]

    def _log_conditionals(self, x_NL: Tensor) -> Tensor:
        return F.log_softmax(self.conditional(x_NL).view(-1, self.L, self.K), -1)

    def orders(self, N: int) -> Tensor:
        """Random orders: when each variable comes, (N, L), from 0."""
        return torch.rand(N, self.L, generator=self.generator).argsort(1).argsort(1)

    def complete(self, x_NL: Tensor) -> Tensor:
        """Draw the unknown variables given the known ones, one after the other in a random order, (N, L)."""
        x_NL = self.check(x_NL).clone()
        rank_NL = self.orders(len(x_NL)).masked_fill(x_NL != UNKNOWN, self.L)
        with torch.no_grad():
            for _ in range(int((x_NL == UNKNOWN).sum(1).max()) if len(x_NL) else 0):
                next_N = rank_NL.argmin(1)
                rows_N = torch.arange(len(x_NL))[rank_NL[torch.arange(len(x_NL)), next_N] < self.L]
                log_NK = self._log_conditionals(x_NL[rows_N])[torch.arange(len(rows_N)), next_N[rows_N]]
                drawn = torch.multinomial(log_NK.exp(), 1, generator=self.generator)[:, 0]
                x_NL[rows_N, next_N[rows_N]] = drawn
                rank_NL[rows_N, next_N[rows_N]] = self.L
        return x_NL

    def sample(self, n: int) -> Tensor:
        """Draw complete rows, (n, L)."""
        return self.complete(torch.full((check_whole_number("n", n, 1), self.L), UNKNOWN))

    def redraw(self, x_NL: Tensor, n: int) -> Tensor:
        """Rows of which ``n`` variables at random are forgotten and drawn again."""
        return self.complete(self.check(x_NL).masked_fill(self.orders(len(x_NL)) < n, UNKNOWN))

    def log_likelihood(self, x_NL: Tensor, rank_NL: Tensor | None = None) -> Tensor:
        """Log probability of the known variables by the chain of conditionals, (N,): as many passes as variables.

        Args:
            x_NL: values; see ``check`` for what is raised.
            rank_NL: when each variable comes, by default at random.
        """
        x_NL = self.check(x_NL)
        rank_NL = self.orders(len(x_NL)) if rank_NL is None else rank_NL
        rank_NL = rank_NL.masked_fill(x_NL == UNKNOWN, self.L).argsort(1).argsort(1)  # unknown ones come last
        total_N = torch.zeros(len(x_NL))
        for step in range(int((x_NL != UNKNOWN).sum(1).max())):
            of_next = (rank_NL == step) & (x_NL != UNKNOWN)
            log_NLK = self._log_conditionals(x_NL.masked_fill(rank_NL >= step, UNKNOWN))
            log_NL = log_NLK.gather(-1, x_NL.clamp(min=0)[..., None])[..., 0]
            total_N = total_N + (log_NL * of_next).sum(1)
        return total_N

    def consistency_gap(self, x_NL: Tensor) -> Tensor:
        """By how much marginals and conditionals disagree at a random step of a random order of each row, (N,).

        Args:
            x_NL: complete rows; see ``check`` for what is raised.

        Returns:
            log p(before) + log p(next | before) - log p(before and next), with gradient.
        """
        x_NL = self.check(x_NL, complete=True)
        rank_NL = self.orders(len(x_NL))
        step_N = torch.randint(self.L, (len(x_NL), 1), generator=self.generator)
        next_N = (rank_NL == step_N).long().argmax(1)
        before = x_NL.masked_fill(rank_NL >= step_N, UNKNOWN)
        after = x_NL.masked_fill(rank_NL > step_N, UNKNOWN)
        rows_N = torch.arange(len(x_NL))
        log_next_N = self._log_conditionals(before)[rows_N, next_N, x_NL[rows_N, next_N]]
        return self._log_marginal(before) + log_next_N - self._log_marginal(after)

    def consistency_loss(self, x_NL: Tensor) -> Tensor:
        """L times the mean squared gap, plus the square of log p(nothing); 0 for a model that agrees with itself."""
        nothing = torch.full((1, self.L), UNKNOWN)
        return self.L * self.consistency_gap(x_NL).square().mean() + self.log_marginal(nothing).square().sum()

    def any_order_loss(self, x_NL: Tensor) -> Tensor:
        """Nats of a row under the conditionals, in expectation over orders: L times the cross-entropy at a random step.

        Args:
            x_NL: complete rows; see ``check`` for what is raised.
        """
        x_NL = self.check(x_NL, complete=True)
        step_N = torch.randint(self.L, (len(x_NL), 1), generator=self.generator)
        hidden_NL = self.orders(len(x_NL)) >= step_N
        log_NLK = self._log_conditionals(x_NL.masked_fill(hidden_NL, UNKNOWN))
        log_NL = log_NLK.gather(-1, x_NL[..., None])[..., 0]
        return -self.L * ((log_NL * hidden_NL).sum(1) / hidden_NL.sum(1)).mean()


def fit_conditionals(
    model: MarginalizationModel, x_NL: Tensor, *, steps: int = 2000, batch_size: int = 256, lr: float = 1e-3
) -> list[float]:
    """First stage from data: conditionals, by any-order autoregression.

    Args:
        model: trained in place.
        x_NL: complete rows.
        steps: of Adam, with a learning rate that falls to 0 as a cosine.
        batch_size: rows of a step.
        lr: learning rate.

    Returns:
        The loss of every step, nats a row.

    Raises:
        OptionError, ShapeError: naming the argument.
    """
    x_NL = model.check(x_NL, complete=True)
    check_whole_number("batch_size", batch_size, 1)

    def loss() -> Tensor:
        return model.any_order_loss(_batch(model, x_NL, batch_size))

    return _minimize(model.conditional, loss, steps, lr)


def fit_marginals(
    model: MarginalizationModel,
    x_NL: Tensor,
    *,
    steps: int = 2000,
    batch_size: int = 256,
    lr: float = 1e-3,
    redrawn: int = 4,
) -> list[float]:
    """Second stage from data: marginals that agree with the conditionals, which stay as they are.

    Half of the rows of a step are data, half samples of the model, of which ``redrawn`` variables are new at each step.

    Args:
        model: trained in place.
        x_NL: complete rows.
        steps: see ``fit_conditionals``.
        batch_size: see ``fit_conditionals``.
        lr: see ``fit_conditionals``.
        redrawn: variables of a sample that are drawn again at each step.

    Returns:
        The consistency loss of every step.

    Raises:
        OptionError, ShapeError: naming the argument.
    """
    x_NL = model.check(x_NL, complete=True)
    half = max(1, check_whole_number("batch_size", batch_size, 1) // 2)
    samples = model.sample(half)

    def loss() -> Tensor:
        nonlocal samples
        samples = model.redraw(samples, redrawn)
        return model.consistency_loss(torch.cat([_batch(model, x_NL, half), samples]))

    return _minimize(model.marginal, loss, steps, lr)


def fit_energy(
    model: MarginalizationModel,
    log_density: Callable[[Tensor], Tensor],
    *,
    steps: int = 3000,
    batch_size: int = 256,
    lr: float = 1e-3,
    consistency: float = 4.0,
    redrawn: int = 4,
) -> list[float]:
    """Train from an unnormalized log density alone: lower KL(model || density) by REINFORCE on samples of the model.

    Args:
        model: trained in place.
        log_density: from complete rows (N, L) to f, (N,), with no gradient needed.
        steps: see ``fit_conditionals``.
        batch_size: samples that are kept over the steps.
        lr: see ``fit_conditionals``.
        consistency: weight of the consistency loss.
        redrawn: variables of a sample that are drawn again at each step.

    Returns:
        The consistency loss of every step.

    Raises:
        OptionError: naming the argument.
    """
    weight = check_number("consistency", consistency, 0)
    samples = model.sample(check_whole_number("batch_size", batch_size, 2))
    gaps = []

    def loss() -> Tensor:
        nonlocal samples
        samples = model.redraw(samples, redrawn)
        log_N = model.log_marginal(samples)
        with torch.no_grad():
            reward_N = log_N - log_density(samples)
            reward_N = (reward_N - reward_N.mean()) / (reward_N.std() + 1e-7)
        agreement = model.consistency_loss(samples)
        gaps.append(agreement.item())
        return (reward_N * log_N).mean() + weight * agreement

    _minimize(model, loss, steps, lr)
    return gaps


def _batch(model: MarginalizationModel, x_NL: Tensor, n: int) -> Tensor:
    return x_NL[torch.randint(len(x_NL), (n,), generator=model.generator)]


def _minimize(part: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> list[float]:
    """Adam on the parameters of a part of the model alone."""
    parameters = list(part.parameters())
    optimizer = torch.optim.Adam(parameters, check_number("lr", lr, 0))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, check_whole_number("steps", steps, 1))
    losses = []
    for _ in range(steps):
        value = loss()
        for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        losses.append(value.item())
    return losses
