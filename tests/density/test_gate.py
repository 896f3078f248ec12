"""A fitted mixture as a router: its gates are responsibilities; a routing as soft labels."""

import numpy as np
import pytest
import torch

from density.tables import rows, same
from mixtura.core import registry, routing
from mixtura.core.errors import OptionError
from mixtura.core.selection import SelectionSpec, select
from mixtura.density import FAMILIES, BayesianGaussianMixture, GaussianMixture, as_gate, soft_labels
from mixtura.nn import Experts, Mixture

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
X, WHICH = rows()
TOKENS = torch.tensor(X, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_are_responsibilities(family):
    mixture = GaussianMixture(3, covariance=family, random_state=0).fit(X)
    gates = routing.dense(as_gate(mixture)(TOKENS)).detach().numpy()
    np.testing.assert_allclose(gates, mixture.predict_proba(X), atol=2e-5)


def test_logits_are_log_joint_densities_up_to_one_constant():
    mixture = GaussianMixture(3, random_state=0).fit(X)
    logits = as_gate(mixture)(TOKENS).logits_TE.detach().numpy()
    np.testing.assert_allclose(
        np.logaddexp.reduce(logits, 1) - 1.5 * np.log(2 * np.pi), mixture.score_samples(X), rtol=1e-4
    )


def test_the_best_two_of_a_bayesian_mixture():
    mixture = BayesianGaussianMixture(3, random_state=0).fit(X)
    plain = GaussianMixture.from_parameters(mixture.weights_, mixture.means_, mixture.covariances_)
    found = as_gate(mixture, 2)(TOKENS)
    expected = np.sort(plain.predict_proba(X), 1)[:, :0:-1]
    np.testing.assert_allclose(as_gate(mixture, 2, renormalize=None)(TOKENS).weights_TK.detach(), expected, atol=2e-5)
    np.testing.assert_allclose(found.weights_TK.detach(), expected / expected.sum(1, keepdims=True), atol=2e-5)


def test_a_gate_routes_a_mixture_of_experts_and_learns():
    router = as_gate(GaussianMixture(3, random_state=0).fit(X), 2)
    assert router.method_config["method"] == "gaussian-mixture-gate"
    assert type(registry.build(router.method_config)) is type(router)
    layer = Mixture(router, Experts(3, 3, 8))
    layer(TOKENS).square().sum().backward()
    for parameter in router.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


def test_a_routing_is_a_soft_label():
    mixture = GaussianMixture(3, random_state=0).fit(X)
    np.testing.assert_allclose(soft_labels(as_gate(mixture)(TOKENS)), mixture.predict_proba(X), atol=2e-5)
    hard = select(np.eye(3)[WHICH] * 9, SelectionSpec(k=1, renormalize=1))
    named = GaussianMixture(3, max_iter=2, tol=1).fit(X, labels=soft_labels(hard))
    same(named, GaussianMixture(3, max_iter=2, tol=1).fit(X, labels=WHICH), rtol=1e-9)
    empty = routing.keep(hard, np.arange(200) > 0)
    np.testing.assert_array_equal(soft_labels(empty)[0], np.ones(3))


def test_what_is_no_gate_is_refused():
    mixture = GaussianMixture(2, random_state=0).fit(X)
    with pytest.raises(OptionError, match="k must be at most the number of experts 2, got 3"):
        as_gate(mixture, 3)
    with pytest.raises(OptionError, match="k must be a whole number of at least 1, got 0"):
        as_gate(mixture, 0)
    with pytest.raises(OptionError, match="component 1 has weight 0"):
        as_gate(GaussianMixture.from_parameters([1, 0], [[0], [1]], [[[1]], [[1]]]))
    with pytest.raises(OptionError, match="noise component"):
        as_gate(GaussianMixture(2, noise_component=True, random_state=0).fit(X))
    with pytest.raises(OptionError, match="gates must not be negative"):
        soft_labels(routing.Routing(np.zeros((1, 2)), np.array([[-1.0]]), np.array([[0]])))
