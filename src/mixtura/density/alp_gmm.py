"""A curriculum over continuous tasks: where a learner's reward changes most, there it is sent (ALP-GMM).

A task is a point of a box. Once the learner is done with a task, its absolute learning progress is how much the reward
differs from that of the nearest task before:

    ALP(task, reward) = |reward - reward of the nearest task told before|

Every ``fit_every`` tasks Gaussian mixtures of several sizes are fitted to the last ``fit_every`` points (task, ALP),
and AIC keeps one. The next tasks come from its components, each as likely as its mean ALP; the weights of the mixture
play no part. A share of the tasks stays uniform over the box, as all of them are until the first fit.

Where the published code and this differ: tasks are scaled to the unit box and ALP to its largest value before distances
and fits, so that units change nothing; of equally near tasks the latest counts; only the first task has no progress
(there: the first six); where no component has progress, tasks are uniform over the box (there: over components, which
favors some places). Seed 0 is a seed.

N tasks told, D axes of the box, K components.

Source: Portelas, Colas, Hofmann and Oudeyer, arXiv:1910.07224.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning

from mixtura.core.errors import FileFormatError, MixturaError, MixturaWarning, OptionError, ShapeError
from mixtura.core.files import write_file
from mixtura.density._checks import check_number, check_whole_number
from mixtura.density.gaussian_mixture import GaussianMixture

Floats = NDArray[np.floating]
FORMAT = "mixtura.density.ALPGMM/1"
SLACK = 1e-6  # of an axis: a task that went through float32 is still in the box
HISTORY = ("tasks", "rewards", "progress")
MIXTURE = ("weights", "means", "covariances")


class ALPGMM:
    """A teacher: ``ask`` for a task, let the learner do it, ``tell`` its reward.

    Several tasks may be asked for before the first of them is told.

    Args:
        low: (D,) lower edges of the box of tasks.
        high: (D,) upper edges.
        n_components: numbers of components to try.
        fit_every: tasks between two fits, and how many of the latest tasks a fit sees.
        random_share: probability that a task is uniform over the box, 0 to 1; 1 is no curriculum.
        random_state: seed of ``numpy.random.default_rng``.

    Attributes:
        tasks: (N, D) tasks told.
        rewards: (N,) their rewards.
        progress: (N,) their absolute learning progress, in units of reward.
        mixture: ``GaussianMixture`` of D + 1 columns in the units of the unit box, or None before the first fit.

    Raises:
        ShapeError: if low and high are not two vectors of one length.
        OptionError: if an argument lies outside of what is accepted.
    """

    def __init__(
        self,
        low: Any,
        high: Any,
        *,
        n_components: Iterable[int] = range(2, 11),
        fit_every: int = 250,
        random_share: float = 0.2,
        random_state: int | None = None,
    ) -> None:
        self.low, self.high = _check_box(low, high)
        self.n_components = sorted({check_whole_number("n_components", K, 1) for K in n_components})
        self.fit_every = check_whole_number("fit_every", fit_every, 2)
        self.random_share = check_number("random_share", random_share, 0)
        if self.random_share > 1:
            raise OptionError(f"random_share must be at most 1, got {random_share!r}")
        if not self.n_components or self.n_components[-1] > self.fit_every:
            raise OptionError(f"n_components must be of 1 .. fit_every={fit_every}, got {self.n_components}")
        self.mixture: GaussianMixture | None = None
        self._rng = np.random.default_rng(random_state)
        self._tell_all(np.empty((len(self.low), 0)), np.empty(0), np.empty(0))

    def _tell_all(self, units_DN: Floats, rewards_N: Floats, progress_N: Floats) -> None:
        """Set what is known; arrays grow by doubling, so that a task costs one look at those before."""
        self._N = len(rewards_N)
        room = 2 * max(self._N, self.fit_every) - self._N
        self._history: Floats = np.pad(np.vstack([units_DN, rewards_N, progress_N]), ((0, 0), (0, room)))

    @property
    def _told(self) -> tuple[Floats, Floats, Floats]:
        """Tasks in the unit box (D, N), rewards and progress."""
        told = self._history[:, : self._N]
        return told[:-2], told[-2], told[-1]

    @property
    def tasks(self) -> Floats:
        """Tasks told, (N, D)."""
        return self._told[0].T * (self.high - self.low) + self.low

    @property
    def rewards(self) -> Floats:
        """Their rewards, (N,)."""
        return self._told[1].copy()

    @property
    def progress(self) -> Floats:
        """Their absolute learning progress, (N,)."""
        return self._told[2].copy()

    def ask(self) -> Floats:
        """The next task, (D,), within the box."""
        utilities_K: Floats = np.zeros(0) if self.mixture is None else self.mixture.means_[:, -1].clip(min=0)
        if self._rng.uniform() < self.random_share or not utilities_K.any():
            unit_D: Floats = self._rng.uniform(size=len(self.low))
        else:
            unit_D = self._draw(self._rng.choice(len(utilities_K), p=utilities_K / utilities_K.sum()))
        return np.clip(self.low + unit_D * (self.high - self.low), self.low, self.high)

    def _draw(self, component: int) -> Floats:
        D = len(self.low)
        mean_D = self.mixture.means_[component, :D]  # type: ignore[union-attr]
        covariance_DD = self.mixture.covariances_[component, :D, :D]  # type: ignore[union-attr]
        return self._rng.multivariate_normal(mean_D, covariance_DD, method="cholesky")

    def tell(self, task: Any, reward: float) -> None:
        """What reward the learner got in a task.

        Args:
            task: (D,), of ``ask`` or any other of the box.
            reward: a finite number.

        Raises:
            ShapeError, OptionError: naming the argument.
        """
        unit_D = self._check_task(task)
        if not isinstance(reward, int | float | np.number) or not np.isfinite(reward):
            raise OptionError(f"reward must be a finite number, got {reward!r}")
        if self._history.shape[1] == self._N:
            self._tell_all(*self._told)
        self._history[:, self._N] = [*unit_D, reward, self._progress(unit_D, float(reward))]
        self._N += 1
        if self._N % self.fit_every == 0:
            self._fit()

    def _check_task(self, task: Any) -> Floats:
        task_D = np.asarray(task, dtype=float)
        if task_D.shape != self.low.shape:
            raise ShapeError(f"task must have shape {self.low.shape}, got {task_D.shape}")
        unit_D = (task_D - self.low) / (self.high - self.low)
        if not ((unit_D >= -SLACK) & (unit_D <= 1 + SLACK)).all():
            raise OptionError(f"task must lie between {self.low.tolist()} and {self.high.tolist()}, got {task!r}")
        return unit_D.clip(0, 1)

    def _progress(self, unit_D: Floats, reward: float) -> float:
        if self._N == 0:
            return 0.0
        units_DN, rewards_N, _ = self._told
        steps_DN = units_DN - unit_D[:, None]
        distances_N = np.einsum("dn,dn->n", steps_DN, steps_DN)
        nearest = self._N - 1 - int(distances_N[::-1].argmin())  # the latest of equally near ones
        return abs(reward - float(rewards_N[nearest]))

    def _fit(self) -> None:
        """Keep the mixture of the lowest AIC; one that cannot be fitted to these tasks is none."""
        units_DN, _, progress_N = (part[..., -self.fit_every :] for part in self._told)
        rows = np.column_stack([*units_DN, progress_N / (progress_N.max() or 1.0)])
        fitted = [self._try(rows, K, int(seed)) for K, seed in zip(self.n_components, self._seeds(), strict=True)]
        found = [mixture for mixture in fitted if mixture is not None]
        self.mixture = min(found, key=lambda mixture: mixture.aic(rows)) if found else None

    def _seeds(self) -> NDArray[np.integer]:
        return self._rng.integers(2**31, size=len(self.n_components))

    def _try(self, rows: Floats, K: int, seed: int) -> GaussianMixture | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # good enough for the next few tasks
            warnings.simplefilter("ignore", MixturaWarning)  # reg_covar is meant for the unit box
            try:
                return GaussianMixture(K, max_iter=100, random_state=seed).fit(rows)
            except MixturaError:  # fewer distinct tasks than components
                return None

    def save(self, path: str | Path) -> None:
        """Write options, history, mixture and the state of the generator to one safetensors file; no pickle."""
        from safetensors.numpy import save_file

        tensors = dict(zip(HISTORY, map(np.ascontiguousarray, self._told), strict=True))
        tensors |= {"low": self.low, "high": self.high}
        if self.mixture is not None:
            values = (self.mixture.weights_, self.mixture.means_, self.mixture.covariances_)
            tensors |= {f"mixture.{name}": np.array(value) for name, value in zip(MIXTURE, values, strict=True)}
        options = {name: getattr(self, name) for name in ("n_components", "fit_every", "random_share")}
        generator = self._rng.bit_generator.state
        about = {"format": FORMAT, "options": json.dumps(options), "generator": json.dumps(generator)}
        with write_file(Path(path)) as partial:
            save_file(tensors, partial, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote; the teacher goes on as if nothing had happened.

        Raises:
            FileFormatError: if the file is not one of a teacher.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "np") as file:
                about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise FileFormatError(f"{str(path)!r} is not a safetensors file: {error}") from error
        if about.get("format") != FORMAT:
            raise FileFormatError(f"{str(path)!r} holds no ALPGMM of format {FORMAT}")
        try:
            self = cls(tensors["low"], tensors["high"], **json.loads(about["options"]))
            self._tell_all(*(tensors[name] for name in HISTORY))
            self._rng.bit_generator.state = json.loads(about["generator"])
            if "mixture.means" in tensors:
                self.mixture = GaussianMixture.from_parameters(*(tensors[f"mixture.{name}"] for name in MIXTURE))
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{str(path)!r} is damaged: {error}") from error
        return self


def _check_box(low: Any, high: Any) -> tuple[Floats, Floats]:
    low_D, high_D = np.array(low, dtype=float), np.array(high, dtype=float)
    if low_D.ndim != 1 or low_D.shape != high_D.shape or not len(low_D):
        raise ShapeError(f"low and high must be vectors of one length, got shapes {low_D.shape} and {high_D.shape}")
    if not (np.isfinite(low_D).all() and np.isfinite(high_D).all() and (low_D < high_D).all()):
        raise OptionError(f"low must lie below high, both finite, got {low_D.tolist()} and {high_D.tolist()}")
    return low_D, high_D
