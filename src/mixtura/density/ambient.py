"""Learning a density, or a denoiser, from rows of which each has a known noise: few clean ones and many noisy ones.

Row i is y_i = x_i + s_i e, its level s_i known, 0 for a clean row. A Gaussian mixture takes that as ``noise_cov`` of
``fit``: responsibilities are those under S_k + s_i^2 I, and a row counts for less, the noisier it is. What is here goes
on from there.

``denoise`` is the posterior mean E[x | y] under a fitted mixture, the best denoiser there is if the mixture is right.

A network h(x_t, t) that shall become E[x_0 | x_t] can be trained on noisy rows alone for levels above theirs: add noise
up to t >= s_i, and ask for the row as it is. Its mean given x_t is, whatever the distribution of x,

    E[x_s | x_t] = (s^2 / t^2) x_t + (1 - s^2 / t^2) E[x_0 | x_t]

so ``ambient_loss`` is the loss of Karras et al. (EDM) between that and y_i; with s_i = 0 it is EDM's own. Below the
level of the noisy rows only clean rows teach, or ``consistency_loss``: denoised means are a martingale,
h(x_t, t) = E[h(x_r, r) | x_t] along the reverse process from t to r.

Arrays are of numpy or of torch, with gradients. N rows of any shape; levels are standard deviations, (N,).

Source: Daras, Cherapanamjeri and Daskalakis, How much is a noisy image worth?, arXiv:2411.02780, and their code, from
which levels (log normal, raised to at least s_i), weights and the schedule of the reverse process are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from mixtura.core.arrays import Array, is_torch
from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._checks import check_noise
from mixtura.density._em import normalize
from mixtura.density._hidden import Hidden
from mixtura.density._parameters import scores_of
from mixtura.density._rows import Rows
from mixtura.density._tables import as_numpy, check_table

Floats = NDArray[np.floating]
Denoiser = Callable[[Array, Array], Array]


def denoise(mixture: Any, X: Any, noise_cov: Any) -> Floats:
    """What rows are without their noise: posterior means under a fitted mixture.

    Args:
        mixture: fitted ``GaussianMixture`` or ``BayesianGaussianMixture`` of what is behind the noise.
        X: (N, D); missing values (NaN) are filled in.
        noise_cov: variances (N, D) or covariances (N, D, D) of the noise of each row.

    Returns:
        E[x | y] of every row, (N, D).

    Raises:
        OptionError: if the mixture has a noise component, which has no mean, or noise_cov is not positive.
        ShapeError: if noise_cov has another shape.
    """
    check_is_fitted(mixture)
    if mixture.noise_log_density_ is not None:
        raise OptionError("a mixture with a noise component has no posterior mean")
    data_ND = check_table(mixture, X, reset=False)
    rows = Rows(data_ND, noise=check_noise(as_numpy(noise_cov), data_ND))
    hidden, out_ND = Hidden(rows, scores_of(mixture.parameters_)), np.empty(data_ND.shape)
    for part, make in hidden.chunks():
        posterior = make()
        shares_KM, _ = normalize(hidden.log_scores(posterior))
        means_KMD = hidden.reference_KD[:, None] + posterior.shifts_KMD
        out_ND[part] = np.einsum("km,kmd->md", shares_KM, means_KMD)
    return out_ND


def noise_levels(normal_N: Array, least_N: Array | float = 0.0, *, mean: float = -1.2, std: float = 1.2) -> Array:
    """Levels to train at, exp(mean + std z), raised to what a row has already.

    Args:
        normal_N: standard normal draws z, (N,).
        least_N: levels s of the rows, (N,) or a number.
        mean: of the log of a level; the default is EDM's, for data with a standard deviation of 0.5.
        std: of the log of a level.

    Returns:
        Levels t >= s, (N,).
    """
    levels_N = mean + std * normal_N
    if is_torch(normal_N):
        return levels_N.exp().clamp(min=least_N)
    return np.maximum(np.exp(levels_N), least_N)


def at_level(denoised: Array, x: Array, sigma_N: Array, level_N: Array) -> Array:
    """E[x_s | x_t] from E[x_0 | x_t]: what a row looked like at a lower level of noise.

    Args:
        denoised: E[x_0 | x_t], (N, ...).
        x: x_t, (N, ...).
        sigma_N: t, positive.
        level_N: s, from 0 to t.

    Raises:
        ShapeError: if there is not a level for each row.
        OptionError: if a level lies outside.
    """
    sigma, level = _columns(x, sigma_N=sigma_N, level_N=level_N)
    if not bool(((sigma > 0) & (level >= 0) & (level <= sigma)).all()):
        raise OptionError("levels must have 0 <= level_N <= sigma_N and 0 < sigma_N in every row")
    kept = (level / sigma) ** 2
    return kept * x + (1 - kept) * denoised


def ambient_loss(
    denoiser: Denoiser, noisy: Array, level_N: Array, sigma_N: Array, normal: Array, *, sigma_data: float = 0.5
) -> Array:
    """Loss of a denoiser on rows with known noise; with a level of 0, EDM's.

    Args:
        denoiser: takes x_t (N, ...) and t (N,), gives E[x_0 | x_t] (N, ...).
        noisy: rows as they are, (N, ...).
        level_N: standard deviation of the noise that each has, 0 for a clean one.
        sigma_N: levels t to train at, at least that: ``noise_levels``.
        normal: standard normal draws, (N, ...).
        sigma_data: standard deviation of clean data, for the weights (t^2 + sd^2) / (t sd)^2.

    Returns:
        Weighted squared error of each row, the mean over its entries, (N,).

    Raises:
        ShapeError, OptionError: as ``at_level``.
    """
    sigma, level = _columns(noisy, sigma_N=sigma_N, level_N=level_N)
    x = noisy + (sigma**2 - level**2).clip(0) ** 0.5 * normal
    found = at_level(denoiser(x, sigma_N), x, sigma_N, level_N)
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return _row_means(weight * (found - noisy) ** 2)


def consistency_loss(
    denoiser: Denoiser, x: Array, sigma_N: Array, lower_N: Array, normals: Array, *, rho: float = 7.0
) -> Array:
    """How far a denoiser is from the mean of what it says further down the reverse process.

    The process is the denoiser's own, so alone this teaches nothing of the data: it carries what ``ambient_loss``
    teaches at high levels down to lower ones.

    Args:
        denoiser: as in ``ambient_loss``.
        x: x_t, (N, ...).
        sigma_N: t.
        lower_N: levels r < t where the process ends, positive.
        normals: standard normal draws of P paths of S Euler steps, (P, S, N, ...).
        rho: levels between are equal steps of the power 1 / rho.

    Returns:
        Squared difference of each row, the mean over its entries, (N,). Of P paths it holds 1 / P of their variance.

    Raises:
        ShapeError: if there is not a level for each row.
        OptionError: if a lower level does not lie below, or is not positive.
    """
    _columns(x, sigma_N=sigma_N, lower_N=lower_N)
    if not bool(((lower_N > 0) & (lower_N < sigma_N)).all()):
        raise OptionError("levels must have 0 < lower_N < sigma_N in every row")
    steps = normals.shape[1]
    roots = [(1 - n / steps) * sigma_N ** (1 / rho) + n / steps * lower_N ** (1 / rho) for n in range(steps + 1)]
    ends = [_reverse(denoiser, x, [root**rho for root in roots], path) for path in normals]
    mean = sum(denoiser(end, lower_N) for end in ends) / len(ends)
    return _row_means((mean - denoiser(x, sigma_N)) ** 2)


def _reverse(denoiser: Denoiser, x: Array, levels: list[Array], normal: Array) -> Array:
    """A path of the reverse process through levels, by Euler steps."""
    for sigma_N, next_N, z in zip(levels, levels[1:], normal, strict=False):
        sigma, then = _columns(x, sigma_N=sigma_N, next_N=next_N)
        drift = 2 * (then - sigma) * (x - denoiser(x, sigma_N)) / sigma
        x = x + drift + (2 * sigma * (sigma - then)) ** 0.5 * z
    return x


def _columns(x: Array, **levels: Array) -> list[Array]:
    """Levels (N,) as (N, 1, ...)."""
    for name, level_N in levels.items():
        if tuple(level_N.shape) != (len(x),):
            raise ShapeError(f"{name} must be ({len(x)},), one for each row, got {tuple(level_N.shape)}")
    return [level_N.reshape(-1, *[1] * (x.ndim - 1)) for level_N in levels.values()]


def _row_means(values: Array) -> Array:
    return values.reshape(len(values), -1).mean(1)
