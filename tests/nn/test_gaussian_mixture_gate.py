"""The Gaussian gate against torch's own distributions."""

import pytest
import torch

from mixtura.core.errors import OptionError
from mixtura.nn.routers.gaussian_mixture_gate import GaussianGate, GaussianMixtureRouter


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_logits_are_log_densities_plus_log_weights(covariance, generator):
    gate = GaussianGate(4, 3, covariance=covariance).double()
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    hidden_TD = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    root_EDD = torch.diag_embed(gate.log_scale.exp())
    if covariance == "full":
        root_EDD = root_EDD + gate.skew.triu(1)
    normal = torch.distributions.MultivariateNormal(gate.mean, precision_matrix=root_EDD @ root_EDD.mT)
    expected_TE = normal.log_prob(hidden_TD[:, None]) + gate.log_weight
    constant = 2 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
    torch.testing.assert_close(gate(hidden_TD), expected_TE + constant)


def test_a_new_gate_goes_by_distance():
    router = GaussianMixtureRouter(3, 5, k=2)
    hidden_TD = router.gate.mean.detach() + 0.01
    assert torch.equal(router(hidden_TD).indices_TK[:, 0], torch.arange(5))


def test_wrong_forms_are_refused():
    with pytest.raises(OptionError, match="covariance must be one of 'full', 'diagonal', got 'tied'"):
        GaussianMixtureRouter(3, 5, covariance="tied")
