"""Laws of every registered layer: a function that builds a ``Mixture``.

T tokens, D width.
"""

import json

import pytest
import torch

from laws.building import SIZES, build, ids, key, rows, state_of, tokens
from mixtura.core import routing as r
from mixtura.nn import Mixture
from mixtura.nn.backends import naive_backend
from mixtura.nn.experts.feed_forward import Experts
from mixtura.nn.state import use_state

every_layer = pytest.mark.parametrize("row", rows("layer"), ids=key)


def recorded(layer, hidden, mask_T=None, token_T=None):
    """Output, and the one routing that is on the tape afterwards beside that of the mixture before."""
    token_T = ids(hidden[..., 0].numel()) if token_T is None else token_T
    state = state_of(token_T, layer.router.num_experts, mask_T)
    with use_state(state):
        out = layer(hidden)
    _, record = state.tape.records
    assert record.layer == layer.layer
    return out, r.check(record.routing)


@every_layer
def test_keeps_any_leading_shape(row, generator):
    layer = build(row).eval()
    hidden_TD = tokens(generator)
    out_TD, _ = recorded(layer, hidden_TD)
    assert torch.equal(recorded(layer, hidden_TD.view(3, 4, -1))[0], out_TD.view(3, 4, -1))
    assert recorded(layer, hidden_TD[:0])[0].shape == (0, SIZES["dim"])


@every_layer
def test_records_its_decision(row, generator):
    _, routing = recorded(build(row), tokens(generator))
    assert len(routing.indices_TK) == 12


@every_layer
def test_padding_leaves_real_tokens_alone(row, generator):
    layer, hidden_TD = build(row).eval(), tokens(generator)
    mask_T = torch.arange(12) % 3 != 0
    out_TD, routing = recorded(layer, hidden_TD, mask_T)
    alone_TD, _ = recorded(layer, hidden_TD[mask_T], token_T=ids(12)[mask_T])
    torch.testing.assert_close(out_TD[mask_T], alone_TD)
    assert (routing.indices_TK[~mask_T] == routing.num_experts).all()


@every_layer
def test_every_parameter_gets_gradient(row, generator):
    layer = build(row)
    recorded(layer, tokens(generator, T=64))[0].square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name


@every_layer
def test_backends_agree(row, generator):
    layer, hidden_TD = build(row), tokens(generator)
    expected_TD, _ = recorded(layer, hidden_TD)
    for module in layer.modules():
        if isinstance(module, Experts):
            module.backend = naive_backend
    torch.testing.assert_close(recorded(layer, hidden_TD)[0], expected_TD, rtol=1e-4, atol=1e-5)


@every_layer
def test_its_configuration_builds_an_equal_one(row, generator):
    layer, hidden_TD = build(row).eval(), tokens(generator)
    other = Mixture.from_config(json.loads(json.dumps(layer.config))).eval()
    other.load_state_dict(layer.state_dict())
    assert other.config == layer.config
    assert torch.equal(recorded(other, hidden_TD)[0], recorded(layer, hidden_TD)[0])
