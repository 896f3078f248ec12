"""The bridge to the mixtures of experts: a fitted mixture as a router, and a routing as soft labels.

T tokens (rows), D columns, E experts (components). torch is imported when a gate is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from mixtura.core.errors import OptionError
from mixtura.core.routing import Routing, dense
from mixtura.density._checks import check_whole_number
from mixtura.density._parameters import Scores, precision_roots, safe_log
from mixtura.density._tables import as_numpy

if TYPE_CHECKING:
    from mixtura.nn.routers.gaussian_mixture_gate import GaussianMixtureRouter


def as_gate(mixture: Any, k: int | None = None, *, renormalize: float | None = 1.0) -> GaussianMixtureRouter:
    """A router whose gates are the responsibilities of a fitted mixture: component e is expert e.

    Args:
        mixture: fitted ``GaussianMixture`` or ``BayesianGaussianMixture`` (its expected parameters).
        k: experts of a token; None for all, which gives ``predict_proba``.
        renormalize: 1 divides the gates of a token by their sum, None leaves them.

    Returns:
        A router in float32, of D columns and E components; its parameters can be trained.

    Raises:
        OptionError: if there is a noise component, a component without weight, or k > E.
    """
    from mixtura.nn.routers.gaussian_mixture_gate import GaussianMixtureRouter

    check_is_fitted(mixture)
    if mixture.noise_log_density_ is not None:
        raise OptionError("a mixture with a noise component is no gate")
    E, D = mixture.means_.shape
    if not (mixture.weights_ > 0).all():
        raise OptionError(f"component {int(mixture.weights_.argmin())} has weight 0, which is no gate")
    k = E if k is None else check_whole_number("k", k, 1)
    scores = Scores(safe_log(mixture.weights_), mixture.means_, precision_roots(mixture.parameters_.covariances))
    form = "diagonal" if scores.diagonal else "full"
    router = GaussianMixtureRouter(D, E, k, covariance=form, renormalize=renormalize)
    _fill(router.gate, scores)
    return router


def soft_labels(routing: Routing) -> NDArray[np.floating]:
    """Gates of a routing as soft labels, (T, E), for ``fit(X, labels=...)``.

    A token without an expert may be of any component.

    Args:
        routing: of numpy arrays or torch tensors; gates must not be negative.

    Raises:
        OptionError: if a gate is negative.
    """
    gates_TE = np.asarray(as_numpy(dense(routing)), dtype=float)
    if (gates_TE < 0).any():
        raise OptionError(f"gates must not be negative to be labels, got {gates_TE.min():.3g}")
    return np.where(gates_TE.sum(1, keepdims=True) > 0, gates_TE, 1.0)


def _fill(gate: Any, scores: Scores) -> None:
    import torch

    roots = scores.roots
    diagonals_ED = roots if scores.diagonal else np.diagonal(roots, axis1=1, axis2=2)
    values = {"log_weight": scores.constants_K, "mean": scores.means_KD, "log_scale": np.log(diagonals_ED)}
    if not scores.diagonal:
        values["skew"] = np.triu(roots, 1)
    with torch.no_grad():
        for name, value in values.items():
            getattr(gate, name).copy_(torch.from_numpy(np.ascontiguousarray(value)))
