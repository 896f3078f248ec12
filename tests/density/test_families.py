"""Each family's update is the maximum of its likelihood: checked against a general optimizer over the family's form."""

import numpy as np
import pytest
from scipy.linalg import expm
from scipy.optimize import minimize

from mixtura.core.errors import UnknownNameError
from mixtura.density.families import ALIASES, FAMILIES, deviance, find_family, fit_covariances

K, D = 3, 3
COUNTS = {  # as mclust::nVarParams(name, d = D, G = K)
    "EII": lambda k, d: 1,
    "VII": lambda k, d: k,
    "EEI": lambda k, d: d,
    "VEI": lambda k, d: k + d - 1,
    "EVI": lambda k, d: 1 + k * (d - 1),
    "VVI": lambda k, d: k * d,
    "EEE": lambda k, d: d * (d + 1) // 2,
    "VEE": lambda k, d: k + (d - 1) + d * (d - 1) // 2,
    "EVE": lambda k, d: 1 + k * (d - 1) + d * (d - 1) // 2,
    "VVE": lambda k, d: k + k * (d - 1) + d * (d - 1) // 2,
    "EEV": lambda k, d: d + k * d * (d - 1) // 2,
    "VEV": lambda k, d: k + (d - 1) + k * d * (d - 1) // 2,
    "EVV": lambda k, d: 1 + k * (d * (d + 1) // 2 - 1),
    "VVV": lambda k, d: k * d * (d + 1) // 2,
}
NESTED = (
    "EII<VII EII<EEI EEI<VEI EEI<EVI VEI<VVI EVI<VVI EEI<EEE EEE<VEE EEE<EVE VEE<VVE EVE<VVE EEE<EEV EEV<VEV EEV<EVV"
)
NESTED += " VEV<VVV EVV<VVV VVE<VVV VVI<VVE VII<VEI VEI<VEE EVI<EVE"
ROTATING = ("EII", "VII", "EEE", "VEE", "EVE", "VVE", "EEV", "VEV", "EVV", "VVV")


def scatters(seed=0, K=K, D=D):
    generator = np.random.default_rng(seed)
    counts = generator.uniform(5, 20, K)
    roots = generator.normal(size=(K, D, D)) * generator.uniform(0.5, 2, (K, 1, D))
    return roots @ roots.swapaxes(1, 2) * counts[:, None, None], counts


def fitted(name, scatter, counts):
    family = find_family(name)
    out = fit_covariances(family, np.diagonal(scatter, 0, 1, 2) if family.diagonal else scatter, counts)
    return out[:, :, None] * np.eye(out.shape[1]) if family.diagonal else out


def compose(family, x):
    """A member of the family from unconstrained numbers."""
    x = iter(x)

    def draw(letter, size):
        copies = {"I": 0, "E": 1, "V": K}[letter]
        given = np.array([next(x) for _ in range(copies * size)]).reshape(copies, size)
        return np.zeros((K, size)) if letter == "I" else np.broadcast_to(given, (K, size))

    volume, shape, turn = draw(family.volume, 1), draw(family.shape, D - 1), draw(family.orientation, D * (D - 1) // 2)
    shape = np.hstack([shape, -shape.sum(1, keepdims=True)])
    skew = np.zeros((K, D, D))
    skew[:, *np.triu_indices(D, 1)] = turn
    turns = np.stack([expm(one - one.T) for one in skew])
    return (turns * np.exp(volume + shape)[:, None]) @ turns.swapaxes(1, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_update_is_the_maximum_of_the_likelihood(name):
    scatter, counts = scatters()
    family = find_family(name)
    found = deviance(scatter, counts, fitted(name, scatter, counts))
    generator = np.random.default_rng(1)
    others = [
        minimize(
            lambda x: deviance(scatter, counts, compose(family, x)),
            generator.normal(size=family.n_parameters(K, D)) * 0.3,
            method="BFGS",
        ).fun
        for _ in range(3)
    ]
    assert found == pytest.approx(min(others), rel=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_parameters_as_mclust(name):
    for k, d in [(1, 1), (1, 4), (3, 2), (5, 7)]:
        assert find_family(name).n_parameters(k, d) == COUNTS[name](k, d)


@pytest.mark.parametrize("pair", NESTED.split())
def test_larger_families_are_at_least_as_likely(pair):
    for seed in range(5):
        scatter, counts = scatters(seed)
        low, high = (deviance(scatter, counts, fitted(name, scatter, counts)) for name in pair.split("<"))
        assert high <= low + 1e-8 * abs(low)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_component_needs_no_volume_letter(name):
    scatter, counts = scatters(K=1)
    twin = {"E": "V", "V": "E"}[name[0]] + name[1:]
    if twin in FAMILIES:
        np.testing.assert_allclose(fitted(name, scatter, counts), fitted(twin, scatter, counts), rtol=1e-10)


@pytest.mark.parametrize("name", ROTATING)
def test_rotated_scatter_gives_rotated_covariances(name):
    scatter, counts = scatters(3)
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))[0]
    turned = fitted(name, turn @ scatter @ turn.T, counts)
    np.testing.assert_allclose(turned, turn @ fitted(name, scatter, counts) @ turn.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_scaled_scatter_gives_scaled_covariances(name):
    scatter, counts = scatters(4)
    np.testing.assert_allclose(fitted(name, scatter * 1e8, counts), 1e8 * fitted(name, scatter, counts), rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name[1] == "E" or name[1:] in ("VI", "VV")])
def test_factors_are_equal_where_the_letters_say_so(name):
    scatter, counts = scatters(5)
    covariances = fitted(name, scatter, counts)
    values = np.linalg.eigvalsh(covariances)
    volumes = np.exp(np.log(values).mean(1))
    shapes = values / volumes[:, None]
    assert (np.ptp(volumes) < 1e-8 * volumes.max()) == (name[0] == "E")
    assert (np.ptp(shapes, axis=0).max() < 1e-8) == (name[1] == "E")


def test_names_of_scikit_learn_and_unknown_names():
    assert {alias: find_family(alias).name for alias in ALIASES} == ALIASES
    with pytest.raises(UnknownNameError, match="did you mean 'V"):
        find_family("VVVV")
    with pytest.raises(UnknownNameError, match="unknown covariance family"):
        find_family(None)
