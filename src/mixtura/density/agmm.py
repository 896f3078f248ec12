"""AGMM: Gaussians of classes in the space of features, which pass labels of a few rows on to all others.

Rows are pixels of a segmentation, tokens, or anything of which few are labeled. Each class c has a mean, and

    G_c(x) = exp(-d_c(x)^2 / (2 s_c^2))        d_c(x) = mean over columns of |x - mean_c|

is a soft label in (0, 1], 1 at the mean; classes that are not present have 0. Online EM moves means and variances, s^2
being the mean of d^2: labeled rows belong to their class, others by the density whose D-th root G is,
w_c s_c^-D G_c^D, and sums over a batch are mixed into the sums so far with a momentum. Means and G keep their
gradients, so features are learned too:

    loss = cross-entropy of labeled rows                              (the caller's own)
         + ``agmm_loss``: BCE(p, G) / 2 of all rows + BCE(G, one-hot) / 2 of labeled rows, means over present classes
         + ``separation_loss``: mean over pairs of present classes of exp(-(mean |mean_i - mean_j|)^2)
         + ``absent_class_loss``: -sum over absent classes of log(1 - p), where a picture's classes are known

Source: Wu et al., arXiv:2403.13225, and their code, which is the method's predecessor: there variances are fixed to
s^2 = 1/2, there is no online EM, and prototypes are added up over a batch instead of averaged before they are pushed
apart; here they are means. The update of online EM is written from the description; shares of G itself, which lacks the
factor s^-D, would let the widest class take all.

Arrays are of numpy or torch. N rows, D columns, K classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixtura.core.arrays import Array, is_torch, softmax
from mixtura.core.errors import OptionError, ShapeError
from mixtura.density._checks import check_whole_number

FIXED = 0.5  # the variance of the published code, G = exp(-d^2)
LEAST = 1e-6  # of variances, and of what a logarithm is taken of


class ClassGaussians(NamedTuple):
    """A Gaussian for each class.

    Attributes:
        means_KD: means; 0 for classes that are not present.
        variances_K: s^2 of the distance d, no gradient.
        shares_K: share of the rows of a class so far; 0 where it is not present.
    """

    means_KD: Array
    variances_K: Array
    shares_K: Array

    @classmethod
    def start(
        cls, features_ND: Array, labels_N: Array, n_classes: int, *, variance: str = "adaptive"
    ) -> ClassGaussians:
        """Gaussians of labeled rows alone.

        Args:
            features_ND: rows; of torch with gradients.
            labels_N: class of each row, -1 where unknown.
            n_classes: K.
            variance: "adaptive", or "fixed" to 1/2.

        Raises:
            OptionError: if no row is labeled, a label is out of range, or ``variance`` is another word.
            ShapeError: if there is not a label for each row.
        """
        labels_NK = _one_hot(features_ND, labels_N, check_whole_number("n_classes", n_classes, 1))
        if not bool((labels_NK > 0).any()):
            raise OptionError("labels_N must hold a label that is known, got -1 alone")
        return _maximize(features_ND, labels_NK, None, 0.0, variance)

    @property
    def present_K(self) -> Array:
        """Whether a class has been seen."""
        return self.shares_K > 0

    def distances(self, features_ND: Array) -> Array:
        """Mean absolute difference to each mean, (N, K)."""
        if features_ND.ndim != 2 or features_ND.shape[1] != self.means_KD.shape[1]:
            wanted = f"(N, {self.means_KD.shape[1]})"
            raise ShapeError(f"features_ND must be {wanted}, got {tuple(features_ND.shape)}")
        return abs(features_ND[:, None] - self.means_KD).mean(-1)

    def scores(self, features_ND: Array) -> Array:
        """Soft labels G, (N, K): in (0, 1], 1 at a mean, 0 for classes that are not present."""
        logits_NK = -(self.distances(features_ND) ** 2) / (2 * self.variances_K)
        return (logits_NK.exp() if is_torch(logits_NK) else np.exp(logits_NK)) * self.present_K

    def responsibilities(self, features_ND: Array) -> Array:
        """Probabilities of present classes by their densities, (N, K)."""
        D = self.means_KD.shape[1]
        logits_NK = -D / 2 * (self.distances(features_ND) ** 2 / self.variances_K + _log(self.variances_K))
        absent_K = 1 - _like(features_ND, self.present_K)
        return softmax(logits_NK + _log(self.shares_K + absent_K) - 1e30 * absent_K)

    def update(
        self, features_ND: Array, labels_N: Array, *, momentum: float = 0.9, variance: str = "adaptive"
    ) -> ClassGaussians:
        """A step of online EM.

        Args:
            features_ND: a batch; means that come out have gradients to it, not to earlier batches.
            labels_N: class of each row, -1 where unknown.
            momentum: share of what was known before; 0 is a step of EM on the batch.
            variance: "adaptive", or "fixed" to 1/2.

        Raises:
            OptionError: if momentum lies outside of 0 .. 1, a label is out of range, or ``variance`` is another word.
            ShapeError: if there is not a label for each row.
        """
        if not 0 <= momentum < 1:
            raise OptionError(f"momentum must lie in 0 .. 1 and below 1, got {momentum!r}")
        labels_NK = _one_hot(features_ND, labels_N, len(self.means_KD))
        known_N1 = labels_NK.sum(1, keepdims=True)
        shares_NK = labels_NK + (1 - known_N1) * _constant(self.responsibilities(features_ND))
        return _maximize(features_ND, shares_NK, self, momentum, variance)


def agmm_loss(probabilities_NK: Array, scores_NK: Array, labels_N: Array, present_K: Array) -> Array:
    """Binary cross-entropies that tie predictions to Gaussians, and Gaussians to labels.

    Args:
        probabilities_NK: predictions of the classifier.
        scores_NK: G of ``ClassGaussians.scores``, with its gradients.
        labels_N: class of each row, -1 where unknown.
        present_K: whether a class is present; at least one.

    Returns:
        A scalar; with every row labeled it is least where predictions and Gaussians are one-hot.

    Raises:
        ShapeError: if arrays do not fit.
        OptionError: if a label is out of range.
    """
    if probabilities_NK.shape != scores_NK.shape or probabilities_NK.ndim != 2:
        shapes = f"{tuple(probabilities_NK.shape)} and {tuple(scores_NK.shape)}"
        raise ShapeError(f"probabilities_NK and scores_NK must both be (N, K), got {shapes}")
    labels_NK = _one_hot(scores_NK, labels_N, scores_NK.shape[1])
    present_K = _like(scores_NK, present_K)
    share_K = present_K / present_K.sum() / 2
    agree_N = (_cross_entropy(probabilities_NK, scores_NK) * share_K).sum(1)
    known_N = labels_NK.sum(1)
    fit_N = (_cross_entropy(scores_NK, labels_NK) * share_K).sum(1) * known_N
    return agree_N.mean() + fit_N.sum() / known_N.sum().clip(1)


def separation_loss(means_KD: Array, present_K: Array) -> Array:
    """Mean over pairs of present classes of exp(-d^2), d the mean absolute difference of their means; 0 to 1."""
    present_K = _like(means_KD, present_K)
    d_KK = abs(means_KD[:, None] - means_KD).mean(-1)
    near_KK = (-(d_KK**2)).exp() if is_torch(d_KK) else np.exp(-(d_KK**2))
    pairs_KK = present_K[:, None] * present_K * (1 - _like(means_KD, np.eye(len(means_KD))))
    return (near_KK * pairs_KK).sum() / pairs_KK.sum().clip(1)


def absent_class_loss(probabilities_NK: Array, present_NK: Array) -> Array:
    """Mean over rows of -sum log(1 - p) of the classes that cannot be there, as a picture's tags say, (N, K)."""
    absent_NK = 1 - _like(probabilities_NK, present_NK)
    return -(absent_NK * _log(1 - probabilities_NK + LEAST)).sum(1).mean()


def _maximize(
    features_ND: Array, shares_NK: Array, before: ClassGaussians | None, momentum: float, variance: str
) -> ClassGaussians:
    if variance not in ("adaptive", "fixed"):
        raise OptionError(f"variance must be 'adaptive' or 'fixed', got {variance!r}")
    new_K = (1 - momentum) * shares_NK.mean(0)
    old_K = 0 * new_K if before is None else momentum * before.shares_K
    total_K = old_K + new_K
    part_NK = (1 - momentum) * shares_NK / len(shares_NK) / (total_K + (total_K == 0))  # of a row in what is known
    kept_K = old_K / (total_K + (total_K == 0))
    means_KD = part_NK.T @ features_ND
    if before is not None:
        means_KD = kept_K[:, None] * _constant(before.means_KD) + means_KD
    found = ClassGaussians(means_KD, FIXED + 0 * total_K, total_K)
    if variance == "fixed":
        return found
    squares_NK = _constant(found.distances(features_ND)) ** 2
    before_K = 0 if before is None else before.variances_K
    return found._replace(variances_K=(kept_K * before_K + (part_NK * squares_NK).sum(0)).clip(LEAST))


def _cross_entropy(p: Array, target: Array) -> Array:
    return -target * _log(p + LEAST) - (1 - target) * _log(1 - p + LEAST)


def _log(x: Array) -> Array:
    return x.log() if is_torch(x) else np.log(x)


def _constant(x: Array) -> Array:
    return x.detach() if is_torch(x) else x


def _like(x: Array, values: Any) -> Array:
    """Values of the type of ``x``."""
    if is_torch(x):
        return x.new_tensor(values) if isinstance(values, np.ndarray) else values.to(x.dtype)
    return np.asarray(values, dtype=x.dtype)


def _one_hot(x: Array, labels_N: Array, K: int) -> Array:
    """Labels as (N, K) of the type of ``x``; zeros where they are not known."""
    if tuple(labels_N.shape) != (len(x),):
        raise ShapeError(f"labels_N must be ({len(x)},), one for each row, got {tuple(labels_N.shape)}")
    if not bool(((labels_N >= -1) & (labels_N < K)).all()):
        raise OptionError(f"labels_N must lie in -1 .. {K - 1}, got {int(labels_N.min())} .. {int(labels_N.max())}")
    classes_K = np.arange(K)
    return _like(x, labels_N[:, None] == (labels_N.new_tensor(classes_K) if is_torch(labels_N) else classes_K))
