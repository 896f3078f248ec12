"""scikit-learn's own checks of an estimator."""

import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator

from mixtura.density import (
    BayesianGaussianMixture,
    GaussianMixture,
    GaussianMixtureRegressor,
    MixtureSearch,
    SplitMergeMixture,
)

ESTIMATORS = [
    GaussianMixture(max_iter=500),
    GaussianMixture(2, covariance="diag", random_state=0, max_iter=500),
    BayesianGaussianMixture(max_iter=500),
    BayesianGaussianMixture(2, covariance="diag", weights="dirichlet", random_state=0, max_iter=2000),
    GaussianMixtureRegressor(),
    GaussianMixtureRegressor(2, covariance="EEE", variance="global-corrected", random_state=0),
    SplitMergeMixture(random_state=0),
    MixtureSearch([1, 2], covariance=["EII", "VVV"], init="kmeans", random_state=0),
]


def checks():
    """Every check but that of array-API input, which scikit-learn leaves to an environment variable."""
    for number, given in enumerate(ESTIMATORS):
        for estimator, check in estimator_checks_generator(given):
            name = check.func.__name__
            if name != "check_array_api_input":
                arguments = "-".join(str(value) for value in check.keywords.values())
                yield pytest.param(estimator, check, id=f"{type(given).__name__}{number}-{name}-{arguments}")


@pytest.mark.filterwarnings("ignore::mixtura.core.errors.MixturaWarning")
@pytest.mark.parametrize(("estimator", "check"), checks())
def test_scikit_learn_checks(estimator, check):
    check(estimator)
