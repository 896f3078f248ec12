"""A dense layer as weights: its formula is the module's, and its slices add up to it."""

import pytest
import torch

from mixtura.nn import FeedForward
from mixtura.nn.dense import FeedForwardWeights


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_formula_and_slices(gated, bias, generator):
    layer = FeedForward(8, 6, activation="gelu", gated=gated, bias=bias)
    gate = layer.gate_proj
    weights = FeedForwardWeights(
        gate.weight if gated else None,
        layer.up_proj.weight,
        layer.down_proj.weight,
        gate.bias if gated else None,
        layer.up_proj.bias,
        layer.down_proj.bias,
        "gelu",
    )
    hidden_TD = torch.randn(5, 8, generator=generator)
    assert (weights.dim, weights.width) == (8, 6)
    torch.testing.assert_close(weights(hidden_TD), layer(hidden_TD))
    left, right = (weights.slice(units)._replace(down_bias_D=None) for units in (slice(0, 2), slice(2, 6)))
    whole_TD = left(hidden_TD) + right(hidden_TD) + (layer.down_proj.bias if bias else 0)
    torch.testing.assert_close(whole_TD, layer(hidden_TD))
