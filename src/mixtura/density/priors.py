"""A prior on means and covariances: with it a component of few rows does not collapse. D columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._parameters import Parameters

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class NIW:
    """Normal-inverse-Wishart prior of every component: S_k ~ IW(nu, psi), mean_k ~ N(mean, S_k / kappa).

    Args:
        kappa: weight of ``mean``, in rows.
        nu: degrees of freedom, more than D - 1; None for D + 2.
        psi: (D, D), or a number times the identity; None for the covariance of the data / K^(2/D), which is no help
            where columns are constant or follow from others.
        mean: (D,); None for the mean of the data.

    The estimate of a VVV component is  (psi + kappa (m - mean)(m - mean).T + W_k) / (n_k + nu + D + 2)  about the
    posterior mean m; other families maximize the same density within their form.

    Source: Fraley and Raftery, Bayesian regularization for normal mixture estimation, J. Classification 24 (2007); the
    defaults are theirs.
    """

    kappa: float = 0.01
    nu: float | None = None
    psi: Any = None
    mean: Any = None

    def resolve(self, mean_D: Floats, covariance_DD: Floats, K: int) -> NIW:
        """The prior with every default filled in from the mean and covariance of the data.

        Raises:
            OptionError: if something is no finite number, kappa negative, nu too small, or psi not positive definite.
            ShapeError: if psi or mean have another width than the data.
        """
        D = len(mean_D)
        kappa, nu = _numbers("kappa", self.kappa), _numbers("nu", D + 2.0 if self.nu is None else self.nu)
        if kappa.ndim or nu.ndim or not kappa >= 0 or not nu > D - 1:
            raise OptionError(f"prior needs kappa >= 0 and nu > {D - 1}, got kappa={self.kappa!r} and nu={nu.tolist()}")
        psi = covariance_DD / K ** (2 / D) if self.psi is None else _numbers("psi", self.psi)
        psi = psi * np.eye(D) if psi.ndim == 0 else psi
        mean = mean_D if self.mean is None else _numbers("mean", self.mean)
        if psi.shape != (D, D) or mean.shape != (D,):
            raise ShapeError(f"prior needs psi ({D}, {D}) and mean ({D},), got {psi.shape} and {mean.shape}")
        if self.psi is not None and not np.linalg.eigvalsh(psi)[0] > 0:
            raise OptionError("prior needs a positive definite psi")
        return replace(self, kappa=float(kappa), nu=float(nu), psi=psi, mean=mean)

    def log_density(self, parameters: Parameters) -> float:
        """Log density at the parameters, without its normalizer; of a resolved prior."""
        full_KDD, difference_KD = parameters.full, parameters.means_KD - self.mean
        _, logs_K = np.linalg.slogdet(full_KDD)
        scatter = self.psi + self.kappa * difference_KD[:, :, None] * difference_KD[:, None]
        traces_K = np.trace(np.linalg.solve(full_KDD, scatter), axis1=1, axis2=2)
        return float(-0.5 * ((self.extra_count * logs_K) + traces_K).sum())

    @property
    def extra_count(self) -> float:
        """What the prior adds to the count of a component when its covariance is estimated; of a resolved prior."""
        return float(self.nu + len(self.mean) + 2)  # type: ignore[operator]


def _numbers(name: str, value: Any) -> Floats:
    try:
        numbers = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise OptionError(f"prior needs numbers as {name}, got {value!r}") from error
    if not np.isfinite(numbers).all():
        raise OptionError(f"prior needs a finite {name}, got {value!r}")
    return numbers
