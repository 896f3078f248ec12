"""Gaussian mixtures with scikit-learn's interface: 14 covariance families, weights, missing values, labels, streams."""

from mixtura.density.agmm import ClassGaussians, absent_class_loss, agmm_loss, separation_loss
from mixtura.density.alp_gmm import ALPGMM
from mixtura.density.ambient import ambient_loss, at_level, consistency_loss, denoise, noise_levels
from mixtura.density.batch import GaussianMixtureBatch
from mixtura.density.bayes_mixture import BayesMixture, RegretBound, hypothesis_weight, regret_bound
from mixtura.density.bayesian_mixture import BayesianGaussianMixture
from mixtura.density.constraints import FixedMeans, MaxConditionNumber, MinWeight, SharedCovariance, TiedWeights
from mixtura.density.errors import SingularComponentError
from mixtura.density.families import FAMILIES
from mixtura.density.gate import as_gate, soft_labels
from mixtura.density.gaussian_mixture import GaussianMixture
from mixtura.density.gaussian_mixture_regressor import GaussianMixtureRegressor
from mixtura.density.ila_sdp import LikelihoodAdjustedSDP, kmeans_sdp
from mixtura.density.kalman import kalman_predict, kalman_update
from mixtura.density.links import CannotLink, MustLink
from mixtura.density.pair_classifier import (
    PairClassifier,
    epistemic_confidence,
    epistemic_covariance,
    probability_radius,
)
from mixtura.density.priors import NIW
from mixtura.density.robust_self_training import RobustSelfTraining, robust_loss
from mixtura.density.search import MixtureSearch
from mixtura.density.split_merge import SplitMergeMixture

__all__ = [
    "ALPGMM",
    "FAMILIES",
    "NIW",
    "BayesMixture",
    "BayesianGaussianMixture",
    "CannotLink",
    "ClassGaussians",
    "FixedMeans",
    "GaussianMixture",
    "GaussianMixtureBatch",
    "GaussianMixtureRegressor",
    "LikelihoodAdjustedSDP",
    "MaxConditionNumber",
    "MinWeight",
    "MixtureSearch",
    "MustLink",
    "PairClassifier",
    "RegretBound",
    "RobustSelfTraining",
    "SharedCovariance",
    "SingularComponentError",
    "SplitMergeMixture",
    "TiedWeights",
    "absent_class_loss",
    "agmm_loss",
    "ambient_loss",
    "as_gate",
    "at_level",
    "consistency_loss",
    "denoise",
    "epistemic_confidence",
    "epistemic_covariance",
    "hypothesis_weight",
    "kalman_predict",
    "kalman_update",
    "kmeans_sdp",
    "noise_levels",
    "probability_radius",
    "regret_bound",
    "robust_loss",
    "separation_loss",
    "soft_labels",
]
