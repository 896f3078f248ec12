"""scikit-learn's own checks of an estimator."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from mixtura.density import GaussianMixture

ESTIMATORS = [GaussianMixture(max_iter=500), GaussianMixture(2, covariance="diag", random_state=0, max_iter=500)]


@pytest.mark.filterwarnings("ignore::mixtura.core.errors.MixturaWarning")
@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_checks(estimator, check):
    check(estimator)
