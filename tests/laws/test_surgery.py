"""Laws of every registered surgery that makes a mixture of a dense layer.

T tokens, D width, F width of the dense layer.
"""

import itertools
import json

import pytest
import torch

from laws.building import SIZES, key, rows
from mixtura.core import registry
from mixtura.core import routing as r
from mixtura.nn import Mixture
from mixtura.nn.dense import FeedForwardWeights
from mixtura.surgery.conversion import Conversion
from mixtura.surgery.sparse_upcycling import sparse_upcycling

D, F, T = SIZES["dim"], 12, 40
every_surgery = pytest.mark.parametrize("row", rows("surgery"), ids=key)


def dense(generator, gated=True, bias=True, dtype=torch.float32):
    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    gate, gate_bias = (draw(F, D), draw(F) if bias else None) if gated else (None, None)
    biases = (draw(F), draw(D)) if bias else (None, None)
    return FeedForwardWeights(gate, draw(F, D), draw(D, F), gate_bias, *biases, "gelu")


def tokens(generator, dtype=torch.float32):
    return torch.randn(T, D, generator=generator).to(dtype)


def tensors(made):
    return list(made.mixture.state_dict().values())


@every_surgery
@pytest.mark.parametrize(("gated", "bias"), itertools.product([True, False], repeat=2))
def test_keeps_what_it_promises(row, gated, bias, generator):
    weights, hidden_TD = dense(generator, gated, bias), tokens(generator)
    made = row(weights)
    out_TD = made.mixture(hidden_TD)
    assert out_TD.isfinite().all()
    assert made.preserves == torch.allclose(out_TD, weights(hidden_TD), rtol=1e-4, atol=1e-4)


@every_surgery
def test_leaves_the_dense_layer_alone(row, generator):
    weights = dense(generator)
    before = [part.clone() for part in weights[:-1]]
    made = row(weights)
    with torch.no_grad():
        for parameter in made.mixture.parameters():
            parameter.zero_()
    assert all(torch.equal(part, old) for part, old in zip(weights[:-1], before, strict=True))


@every_surgery
def test_is_deterministic_and_draws_from_its_seed_alone(row, generator):
    weights = dense(generator)
    first = row(weights, seed=3)
    torch.manual_seed(99)
    again, other = row(weights, seed=3), row(weights, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(other), strict=True))


@every_surgery
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_keeps_the_type(row, dtype, generator):
    made = row(dense(generator, dtype=dtype))
    assert {tensor.dtype for tensor in tensors(made)} == {dtype}
    assert made.mixture(tokens(generator, dtype)).dtype == dtype


@every_surgery
def test_its_configuration_builds_what_takes_its_weights(row, generator):
    made, hidden_TD = row(dense(generator)).mixture, tokens(generator)
    other = Mixture.from_config(json.loads(json.dumps(made.config)))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(hidden_TD), made(hidden_TD))


@every_surgery
def test_routes_and_trains(row, generator):
    """Every expert gets a gradient once all are chosen; the gate does, since experts or shards differ."""
    made, hidden_TD = row(dense(generator)).mixture, tokens(generator)
    r.check(made.router(hidden_TD))
    (made(hidden_TD) * torch.randn(T, D, generator=generator)).sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def shrinks(dense: FeedForwardWeights, *, seed: int = 0) -> Conversion:
    """Weights that are not divided by their sum: the output shrinks, and the promise is false."""
    made = sparse_upcycling(dense, seed=seed).mixture
    with torch.no_grad():
        made.experts.down_proj.mul_(0.7)
    return Conversion(made, preserves=True)


def unseeded(dense: FeedForwardWeights, *, seed: int = 0) -> Conversion:
    """Rows of the router are drawn from the global generator."""
    return sparse_upcycling(dense, router_rows_CD=torch.randn(4, dense.dim), seed=seed)


def shares(dense: FeedForwardWeights, *, seed: int = 0) -> Conversion:
    """The up projection of the mixture is the dense layer's own tensor."""
    made = sparse_upcycling(dense, copies=1, shards=1, k=1, seed=seed).mixture
    made.experts.up_proj = torch.nn.Parameter(dense.up_FD[None])
    return Conversion(made, preserves=True)


@pytest.mark.parametrize(
    ("law", "broken"),
    [
        (lambda row, generator: test_keeps_what_it_promises(row, True, True, generator), shrinks),
        (test_is_deterministic_and_draws_from_its_seed_alone, unseeded),
        (test_leaves_the_dense_layer_alone, shares),
    ],
    ids=["promise", "seed", "shared tensor"],
)
@pytest.mark.filterwarnings("ignore:a top-1 gate")
def test_a_broken_surgery_breaks_its_law(law, broken, generator):
    with pytest.raises(AssertionError):
        law(registry.Method(broken.__name__, "surgery", broken), generator)
