"""Gaussian mixtures with scikit-learn's interface: 14 covariance families, weights, missing values, labels, streams."""

from mixtura.density.alp_gmm import ALPGMM
from mixtura.density.batch import GaussianMixtureBatch
from mixtura.density.bayesian_mixture import BayesianGaussianMixture
from mixtura.density.constraints import FixedMeans, MaxConditionNumber, MinWeight, SharedCovariance, TiedWeights
from mixtura.density.errors import SingularComponentError
from mixtura.density.families import FAMILIES
from mixtura.density.gate import as_gate, soft_labels
from mixtura.density.gaussian_mixture import GaussianMixture
from mixtura.density.links import CannotLink, MustLink
from mixtura.density.priors import NIW
from mixtura.density.search import MixtureSearch

__all__ = [
    "ALPGMM",
    "FAMILIES",
    "NIW",
    "BayesianGaussianMixture",
    "CannotLink",
    "FixedMeans",
    "GaussianMixture",
    "GaussianMixtureBatch",
    "MaxConditionNumber",
    "MinWeight",
    "MixtureSearch",
    "MustLink",
    "SharedCovariance",
    "SingularComponentError",
    "TiedWeights",
    "as_gate",
    "soft_labels",
]
