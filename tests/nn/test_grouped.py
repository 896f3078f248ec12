"""Torch's grouped product as a backend: equal to the formula, forward and backward, and what it cannot.

T tokens, D width, E experts, K slots a token, F expert width.
"""

import pytest
import torch

from mixtura.core.errors import NotExpressibleError
from mixtura.nn import Experts
from mixtura.nn.backends import naive_backend
from mixtura.nn.backends.grouped import grouped_backend, why_not_grouped

LAYOUTS = [{}, {"bias": True}, {"transposed": True, "interleaved": True, "bias": True}, {"gated": False, "bias": True}]


def case(T=9, K=2, E=4, D=16, F=24, dtype=torch.float32, **layout):
    torch.manual_seed(T)
    experts = Experts(E, D, F, **layout)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype), torch.randn(T, D).to(dtype), torch.randint(0, E + 1, (T, K)), torch.rand(T, K)


def computed(backend, experts, hidden_TD, indices_TK, weights_TK):
    """Output, and gradients of all inputs."""
    leaves = [hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_(), *experts.parameters()]
    out_TD = backend(experts, leaves[0], indices_TK, leaves[1])
    probe_TD = torch.linspace(-1, 2, out_TD.numel(), dtype=out_TD.dtype).view_as(out_TD)
    return out_TD, *torch.autograd.grad((out_TD * probe_TD).sum(), leaves)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_it_is_the_formula(layout, dtype, tolerance):
    experts, *inputs = case(dtype=dtype, **layout)
    found = computed(grouped_backend, experts, *inputs)
    hidden_TD, indices_TK, weights_TK = inputs
    wanted = computed(naive_backend, experts.double(), hidden_TD.double(), indices_TK, weights_TK.double())
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("T", [0, 3])
def test_without_a_filled_slot_everything_is_zero(T):
    experts, hidden_TD, indices_TK, weights_TK = case(T)
    assert not any(t.any() for t in computed(grouped_backend, experts, hidden_TD, indices_TK.fill_(4), weights_TK))


@pytest.mark.parametrize(
    ("reason", "made", "dtype"),
    [
        ("tokens and weights must be float32, bfloat16 or float16 alike", case(dtype=torch.float64), torch.float64),
        ("tokens and weights must be float32, bfloat16 or float16 alike", case(), torch.bfloat16),
        ("widths must be multiples of 16 bytes", case(D=6), torch.float32),
        ("widths must be multiples of 16 bytes", case(F=12, dtype=torch.bfloat16), torch.bfloat16),
    ],
)
def test_what_it_cannot_is_said(reason, made, dtype):
    experts, hidden_TD, *slots = made
    with pytest.raises(NotExpressibleError, match=reason):
        grouped_backend(experts, hidden_TD.to(dtype), *slots)


def test_memory_that_begins_anywhere_autocast_and_transforms_are_refused():
    experts, hidden_TD, *slots = case()
    shifted_TD = torch.empty(9 * 16 + 1)[1:].view(9, 16).copy_(hidden_TD)
    assert why_not_grouped(experts, shifted_TD) == "tensors must begin at multiples of 16 bytes"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert why_not_grouped(experts, hidden_TD) == "it knows no autocast"
    with pytest.raises(NotExpressibleError, match="without transforms"):
        torch.func.grad(lambda x: grouped_backend(experts, x, *slots).sum())(hidden_TD)
