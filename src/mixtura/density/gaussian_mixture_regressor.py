"""Regression with a Gaussian mixture: fit the joint density of inputs and outputs, then ask for the outputs.

Of a joint mixture the conditional of y given x is again a mixture, in closed form, and its mean is a mixture of linear
experts with responsibilities as gates (Kain and Macon's voice conversion, and every speaker conversion by Gaussian
mixtures since):

    y(x) = sum_k p_k(x) (m_k^y + S_k^yx (S_k^xx)^-1 (x - m_k^x)),    p_k(x) ~ w_k N(x; m_k^x, S_k^xx)

With one component this is ordinary least squares, but for ``reg_covar``. The mean varies less than y does
(over-smoothing: what x does not tell is averaged out), of which ``variance="global-corrected"`` is the remedy where
predictions should look like outputs rather than be near them: each output is scaled about its mean until it varies over
the training rows as y does.

Source: Kain and Macon, Spectral voice conversion for text-to-speech synthesis, ICASSP 1998; Toda, Black and Tokuda,
Voice conversion based on maximum-likelihood estimation of spectral parameter trajectory, IEEE TASLP 15 (2007), for the
global variance; the laryngectomees' use is arXiv:1208.1418.

N rows, D inputs, R outputs, K components.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import _check_sample_weight, check_array, check_is_fitted

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._files import Saved
from mixtura.density._hidden import patterns
from mixtura.density._parameters import Parameters
from mixtura.density._queries import conditional_of
from mixtura.density._rows import Rows
from mixtura.density._tables import as_numpy, check_table
from mixtura.density.batch import GaussianMixtureBatch
from mixtura.density.families import find_family
from mixtura.density.gaussian_mixture import GaussianMixture
from mixtura.density.priors import NIW

Floats = NDArray[np.floating]
VARIANCES = ("raw", "global-corrected")
SMALL = 1e-6  # of a column's variance, added to it
FLAT = 1e-9  # predictions that vary less than that, of what outputs do, do not vary
CHUNK = 1 << 20  # numbers of the components' means of a chunk


class Regression(NamedTuple):
    """What was learned.

    Attributes:
        weights_K: of the joint mixture.
        means_KD: of inputs and outputs, (K, D + R).
        covariances: (K, D + R, D + R), or their diagonals.
        predicted_R: means of the predictions over the training rows.
        mean_R: means of the outputs over them.
        gain_R: standard deviation of the outputs over that of the predictions; nan where predictions do not vary.
        flat: 1 if y came without an axis of outputs.
    """

    weights_K: Floats
    means_KD: Floats
    covariances: Floats
    predicted_R: Floats
    mean_R: Floats
    gain_R: Floats
    flat: float


class GaussianMixtureRegressor(RegressorMixin, MultiOutputMixin, Saved, BaseEstimator):
    """Predict one or several outputs, with how sure that is, from a Gaussian mixture of inputs and outputs together.

    Args:
        n_components: K, the number of local linear experts.
        covariance: a family as in ``GaussianMixture``. In diagonal families experts are constants.
        variance: "raw" for the conditional mean, which has the least squared error; "global-corrected" for predictions
            that vary as the outputs do.
        reg_covar: as in ``GaussianMixture``, of inputs, then outputs; None for a millionth of each column's variance,
            so that units do not matter.
        prior: ``NIW`` of the joint mixture, or None.
        init: as in ``GaussianMixture``; whitening is the default, since units of inputs and outputs differ.
        n_init: starts, of which the likeliest result is kept.
        max_iter: iterations at most.
        tol: of the mean log likelihood, where iteration ends.
        random_state: seed or ``RandomState`` of the start.

    Attributes:
        mixture_: the fitted ``GaussianMixture`` of the columns of inputs, then outputs.
        n_outputs_: R.
        n_features_in_: D.
        n_iter_: iterations of the best start.
        converged_: whether they ended by ``tol``.
        lower_bound_: mean log likelihood of a row of inputs and outputs.
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        covariance: str = "VVV",
        variance: str = "raw",
        reg_covar: Any = None,
        prior: NIW | None = None,
        init: Any = "whitened-kmeans",
        n_init: int = 1,
        max_iter: int = 200,
        tol: float = 1e-3,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.covariance = covariance
        self.variance = variance
        self.reg_covar = reg_covar
        self.prior = prior
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the joint mixture by EM.

        Args:
            X: (N, D); NaN where an input is missing at random.
            y: (N,) or (N, R).
            sample_weight: (N,); a row of weight 2 counts as two rows, one of weight 0 is left out.

        Raises:
            SingularComponentError: if a component collapses.
            OptionError: naming the argument.
        """
        self._check_variance()
        data_ND = check_table(self, X, reset=True)
        y_NR, flat = _outputs(self, y, len(data_ND))
        weights_N = _check_sample_weight(as_numpy(sample_weight), data_ND, dtype=np.float64, ensure_non_negative=True)
        options = {name: value for name, value in self.get_params(deep=False).items() if name != "variance"}
        joint_NC = np.hstack([data_ND, y_NR])
        if self.reg_covar is None:
            options["reg_covar"] = _small_variances(joint_NC, weights_N)
        mixture = GaussianMixture(**options)
        mixture.fit(joint_NC, sample_weight=None if sample_weight is None else weights_N)
        self.n_iter_, self.converged_, self.lower_bound_ = mixture.n_iter_, mixture.converged_, mixture.lower_bound_
        own = _own_moments(_means(mixture.parameters_, data_ND), y_NR, weights_N)
        joint = mixture.parameters_
        self._set_state(Regression(joint.weights_K, joint.means_KD, joint.covariances, *own, float(flat)))
        return self

    def predict(self, X: Any, return_std: bool = False) -> Floats | tuple[Floats, Floats]:
        """Outputs of rows.

        Args:
            X: (N, D); with NaN a row is predicted from what is there.
            return_std: whether the standard deviation of each output given the row comes too. It is that of the mixture
                and so the same for both kinds of ``variance``.

        Returns:
            (N,) or (N, R) as y was, or two such.

        Raises:
            OptionError: if predictions should be corrected that do not vary.
        """
        check_is_fitted(self)
        self._check_variance()
        data_ND = check_table(self, X, reset=False)
        means_NR = _means(self.mixture_.parameters_, data_ND)
        if self.variance == "global-corrected":
            means_NR = self._corrected(means_NR)
        shape = (len(data_ND),) if self._regression.flat else means_NR.shape
        if not return_std:
            return means_NR.reshape(shape)
        std_NR = np.empty_like(means_NR)
        for part, batch in _conditionals(self.mixture_.parameters_, data_ND):
            std_NR[part] = _deviations(batch)[:, -self.n_outputs_ :]
        return means_NR.reshape(shape), std_NR.reshape(shape)

    def predict_dist(self, X: Any) -> GaussianMixtureBatch:
        """The whole conditional density of the outputs of each row: a mixture of K Gaussians of R columns.

        Args:
            X: (N, D), without missing values.

        Raises:
            OptionError: if values are missing.
        """
        check_is_fitted(self)
        data_ND = check_table(self, X, reset=False)
        if np.isnan(data_ND).any():
            raise OptionError("X must be finite for predict_dist; predict takes missing values")
        return self.mixture_.conditional(data_ND, range(self.n_features_in_))

    def _check_variance(self) -> None:
        if self.variance not in VARIANCES:
            raise OptionError(f"variance must be one of {', '.join(VARIANCES)}, got {self.variance!r}")

    def _corrected(self, means_NR: Floats) -> Floats:
        known = self._regression
        if np.isnan(known.gain_R).any():
            output = int(np.flatnonzero(np.isnan(known.gain_R))[0])
            raise OptionError(
                f"variance='global-corrected' cannot scale output {output}: its predictions are the same for all rows"
            )
        return known.mean_R + known.gain_R * (means_NR - known.predicted_R)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _check_state(self) -> None:
        if self.n_components != len(self.mixture_.weights_):
            raise ValueError(
                f"n_components={self.n_components} does not go with {len(self.mixture_.weights_)} components"
            )
        if find_family(self.covariance) != find_family(self.mixture_.covariance):
            raise ValueError(
                f"covariance={self.covariance!r} does not go with a mixture of {self.mixture_.covariance!r}"
            )

    _state_type = Regression

    @property
    def _state(self) -> Regression:
        return self._regression

    def _set_state(self, state: Regression) -> None:
        self._regression = state
        self.n_outputs_ = len(state.mean_R)
        self.n_features_in_ = state.means_KD.shape[1] - self.n_outputs_
        self.mixture_ = GaussianMixture.from_parameters(
            state.weights_K, state.means_KD, state.covariances, covariance=self.covariance
        )


def _outputs(estimator: Any, y: Any, N: int) -> tuple[Floats, bool]:
    """Outputs (N, R), and whether they came without their axis."""
    if y is None:
        raise OptionError(f"{type(estimator).__name__} requires y to be passed, but the target y is None")
    y = check_array(as_numpy(y), ensure_2d=False, dtype=np.float64, input_name="y", estimator=estimator)
    if y.ndim not in (1, 2) or len(y) != N:
        raise ShapeError(f"y must be ({N},) or ({N}, R), as X has {N} rows, got {y.shape}: inconsistent lengths")
    return y.reshape(N, -1), y.ndim == 1


def _small_variances(joint_NC: Floats, weights_N: Floats) -> Floats:
    """A small part of the variance of each column, and of 1 where there is none, (D + R,)."""
    rows = Rows(joint_NC[weights_N > 0], weights_N[weights_N > 0])
    variances_C = rows.frame.scale_D**2
    variances_C[rows.known_columns()[1]] = 1.0
    return SMALL * variances_C


def _own_moments(found_NR: Floats, y_NR: Floats, weights_N: Floats) -> tuple[Floats, Floats, Floats]:
    """Means of predictions and of outputs, and the ratio of their deviations; nan where predictions do not vary."""
    (found_R, own_R), (mean_R, wanted_R) = (_moments(values_NR, weights_N) for values_NR in (found_NR, y_NR))
    with np.errstate(divide="ignore", invalid="ignore"):
        gain_R = np.where(own_R > FLAT * wanted_R, wanted_R / own_R, np.nan)
    return found_R, mean_R, np.where(wanted_R == 0, 1.0, gain_R)


def _moments(values_NR: Floats, weights_N: Floats) -> tuple[Floats, Floats]:
    """Weighted means and standard deviations."""
    mean_R = np.average(values_NR, axis=0, weights=weights_N)
    return mean_R, np.sqrt(np.average((values_NR - mean_R) ** 2, axis=0, weights=weights_N))


def _conditionals(parameters: Parameters, data_ND: Floats) -> Iterator[tuple[NDArray[np.intp], GaussianMixtureBatch]]:
    """Rows of which the same inputs are known, and the conditional of the other columns, outputs last."""
    numbers = parameters.means_KD.size
    for observed_D, index in patterns(data_ND):
        given = np.flatnonzero(observed_D)
        for start in range(0, len(index), max(1, CHUNK // numbers)):
            part = index[start : start + max(1, CHUNK // numbers)]
            yield part, conditional_of(parameters, data_ND[np.ix_(part, given)].astype(np.float64), given)


def _means(parameters: Parameters, data_ND: Floats) -> Floats:
    """Conditional means of the outputs, (N, R)."""
    out_NR = np.empty((len(data_ND), parameters.means_KD.shape[1] - data_ND.shape[1]))
    for part, batch in _conditionals(parameters, data_ND):
        out_NR[part] = batch.mean()[:, -out_NR.shape[1] :]
    return out_NR


def _deviations(batch: GaussianMixtureBatch) -> Floats:
    """Standard deviations of the columns of each mixture, (N, D)."""
    variances_KD = np.diagonal(batch.covariances, axis1=1, axis2=2)
    between_NKD = (batch.means - batch.mean()[:, None]) ** 2
    return np.sqrt(np.einsum("nk,nkd->nd", batch.weights, variances_KD + between_NKD))
