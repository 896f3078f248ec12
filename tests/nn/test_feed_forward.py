"""Stacked experts: their layouts are one function, their views write through, their activations are transformers'."""

import itertools

import pytest
import torch
from transformers.activations import ACT2FN

from mixtura.core.errors import OptionError, UnknownNameError
from mixtura.nn import Experts
from mixtura.nn.experts.activations import ACTIVATIONS, activation
from mixtura.nn.experts.feed_forward import view_expert

LAYOUTS = list(itertools.product([False, True], [False, True]))


def copied(experts, **layout):
    """The same experts stored another way, written through their views."""
    other = Experts(experts.num_experts, experts.dim, experts.width, **layout)
    with torch.no_grad():
        for e in range(experts.num_experts):
            for target, source in zip(view_expert(other, e), view_expert(experts, e), strict=True):
                assert (target is None) == (source is None)
                if target is not None:
                    target.copy_(source)
    return other


@pytest.mark.parametrize(("transposed", "interleaved"), LAYOUTS)
@pytest.mark.parametrize("gated", [True, False])
def test_layouts_store_one_function(transposed, interleaved, gated, generator):
    options = {"gated": gated, "bias": True}
    torch.manual_seed(0)
    plain = Experts(3, 8, 4, **options)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter)
    other = copied(plain, transposed=transposed, interleaved=interleaved and gated, **options)
    hidden_TD, indices_TK = torch.randn(5, 8, generator=generator), torch.tensor([[0], [1], [2], [1], [0]])
    weights_TK = torch.rand(5, 1, generator=generator)
    torch.testing.assert_close(other(hidden_TD, indices_TK, weights_TK), plain(hidden_TD, indices_TK, weights_TK))


def test_weights_start_small_and_biases_at_0():
    torch.manual_seed(0)
    experts = Experts(8, 64, 32, bias=True)
    assert experts.gate_up_proj.std().item() == pytest.approx(0.02, rel=0.05)
    assert experts.down_proj.std().item() == pytest.approx(0.02, rel=0.05)
    assert not experts.gate_up_proj_bias.any()
    assert not experts.down_proj_bias.any()


@pytest.mark.parametrize("name", ["num_experts", "dim", "width"])
def test_sizes_below_1_are_refused(name):
    with pytest.raises(OptionError, match=f"{name} must be at least 1, got 0"):
        Experts(**{"num_experts": 2, "dim": 2, "width": 2, name: 0})


def test_interleaved_needs_a_gate():
    with pytest.raises(OptionError, match="interleaved needs gated=True"):
        Experts(2, 2, 2, gated=False, interleaved=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers_to_the_bit(name):
    x = torch.linspace(-6, 6, 1001)
    assert torch.equal(activation(name)(x), ACT2FN[name](x))


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown activation 'sillu'; did you mean 'silu'"):
        Experts(2, 2, 2, activation="sillu")
