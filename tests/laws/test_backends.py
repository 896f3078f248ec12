"""Laws of every backend: it agrees with loops over tokens and slots, forward and backward.

T tokens, D width, E experts, K slots a token, F expert width.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mixtura.nn import Experts
from mixtura.nn.backends import BACKENDS
from mixtura.nn.experts.feed_forward import view_expert

LAYOUTS = [
    {"gated": gated, "bias": bias, "transposed": transposed, "interleaved": interleaved}
    for gated in (True, False)
    for bias in (True, False)
    for transposed in (True, False)
    for interleaved in (True, False)
    if gated or not interleaved
]
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)


def one_token(experts, e, x_D):
    """f_e of one token, from the weights of that expert alone."""
    view = view_expert(experts, e)
    up_F = F.linear(x_D, view.up_FD, view.up_bias_F)
    if view.gate_FD is None:
        inner_F = experts.act_fn(up_F)
    else:
        inner_F = experts.act_fn(F.linear(x_D, view.gate_FD, view.gate_bias_F)) * up_F
    return F.linear(inner_F, view.down_DF, view.down_bias_D)


def loops(experts, hidden_TD, indices_TK, weights_TK):
    """The formula, written with loops."""
    rows = []
    for t, x_D in enumerate(hidden_TD):
        filled = [(e, k) for k, e in enumerate(indices_TK[t].tolist()) if e < experts.num_experts]
        rows.append(sum((weights_TK[t, k] * one_token(experts, e, x_D) for e, k in filled), torch.zeros_like(x_D)))
    return torch.stack(rows) if rows else torch.zeros_like(hidden_TD)


def gradients(out_TD, *leaves):
    """Of a fixed linear function of the output; zeros where nothing flows."""
    probe_TD = torch.linspace(-1, 2, out_TD.numel(), dtype=out_TD.dtype).view_as(out_TD)
    if not out_TD.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad((out_TD * probe_TD).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


@st.composite
def cases(draw):
    """Experts in any layout, tokens, slots of which some are empty or name an expert twice, weights."""
    E, D, width, K = (draw(st.integers(1, 5)) for _ in range(4))
    T = draw(st.integers(0, 7))
    torch.manual_seed(draw(st.integers(0, 99)))
    experts = Experts(E, D, width, activation=draw(st.sampled_from(["silu", "gelu"])), **draw(st.sampled_from(LAYOUTS)))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    indices_TK = torch.randint(0, E + 1, (T, K))
    if draw(st.integers(0, 5)) == 0:
        indices_TK.fill_(E)
    return experts, torch.randn(T, D), indices_TK, torch.randn(T, K)


@every_backend
@given(case=cases())
def test_agrees_with_the_loops(backend, case):
    experts, hidden_TD, indices_TK, weights_TK = case
    experts.double()
    leaves = (hidden_TD.double().requires_grad_(), weights_TK.double().requires_grad_())
    expected_TD = loops(experts, leaves[0], indices_TK, leaves[1])
    out_TD = backend(experts, leaves[0], indices_TK, leaves[1])
    torch.testing.assert_close(out_TD, expected_TD)
    everything = (*leaves, *experts.parameters())
    for got, expected in zip(gradients(out_TD, *everything), gradients(expected_TD, *everything), strict=True):
        torch.testing.assert_close(got, expected)


@every_backend
@given(case=cases())
def test_agrees_in_float32(backend, case):
    experts, hidden_TD, indices_TK, weights_TK = case
    expected_TD = loops(experts.double(), hidden_TD.double(), indices_TK, weights_TK.double())
    out_TD = backend(experts.float(), hidden_TD, indices_TK, weights_TK)
    torch.testing.assert_close(out_TD, expected_TD.float(), rtol=1e-5, atol=1e-4)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(case=cases())
def test_agrees_in_low_precision(backend, dtype, case):
    experts, hidden_TD, indices_TK, weights_TK = case
    low = [x.to(dtype) for x in (hidden_TD / 4, weights_TK / 4)]
    experts.to(dtype)
    out_TD = backend(experts, low[0], indices_TK, low[1])
    expected_TD = loops(experts.double(), low[0].double(), indices_TK, low[1].double())
    scale = max(1.0, expected_TD.abs().max().item() if expected_TD.numel() else 1.0)
    assert out_TD.dtype == dtype
    torch.testing.assert_close(out_TD.double(), expected_TD, rtol=0.1, atol=0.1 * scale)


def slots(T=10, E=5, K=3):
    """Slots without the last expert; token 2 has none, token 3 one."""
    generator = torch.Generator().manual_seed(1)
    indices_TK = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])
    indices_TK[2], indices_TK[3, 1:] = E, E
    return indices_TK, torch.rand(T, K, generator=generator)


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(k for k, v in layout.items() if v) or "plain")
def test_tokens_without_a_slot_are_never_read(backend, layout, generator):
    """NaN in a row of padding reaches neither the output nor any gradient."""
    experts = Experts(5, 8, 4, **layout)
    hidden_TD = torch.randn(10, 8, generator=generator)
    indices_TK, weights_TK = slots()
    expected_TD = backend(experts, hidden_TD, indices_TK, weights_TK)
    hidden_TD[2] = torch.nan
    weights_TK = weights_TK.masked_fill(indices_TK == 5, torch.nan)
    leaves = (hidden_TD.requires_grad_(), weights_TK.requires_grad_(), *experts.parameters())
    out_TD = backend(experts, leaves[0], indices_TK, leaves[1])
    assert torch.equal(out_TD, expected_TD)
    for gradient in gradients(out_TD, *leaves):
        assert gradient.isfinite().all()


@every_backend
def test_an_idle_expert_gets_a_zero_gradient(backend, generator):
    experts = Experts(5, 8, 4, bias=True)
    backend(experts, torch.randn(10, 8, generator=generator), *slots()).sum().backward()
    for name, parameter in experts.named_parameters():
        assert all(parameter.grad[e].any() for e in range(4)), name
        assert not parameter.grad[4].any(), name


@every_backend
@pytest.mark.parametrize("T", [0, 3])
def test_a_call_without_any_filled_slot_still_has_a_graph(backend, T):
    """So that every parameter has a gradient on every rank, as data parallel training asks for."""
    experts = Experts(3, 8, 4, bias=True)
    out_TD = backend(experts, torch.zeros(T, 8), torch.full((T, 2), 3), torch.zeros(T, 2))
    out_TD.sum().backward()
    assert out_TD.shape == (T, 8)
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@every_backend
def test_indices_beyond_the_empty_slot_are_empty_too(backend, generator):
    """Expert parallelism marks the slots of other ranks so."""
    experts, hidden_TD = Experts(5, 8, 4), torch.randn(10, 8, generator=generator)
    indices_TK, weights_TK = slots()
    beyond_TK = torch.where(indices_TK == 5, 9, indices_TK)
    assert torch.equal(
        backend(experts, hidden_TD, beyond_TK, weights_TK), backend(experts, hidden_TD, indices_TK, weights_TK)
    )


@every_backend
def test_a_norm_after_the_expert_is_applied_before_the_weight(backend, generator):
    experts, hidden_TD = Experts(5, 8, 4), torch.randn(10, 8, generator=generator)
    indices_TK, weights_TK = torch.zeros(10, 1, dtype=torch.int64), torch.full((10, 1), 0.5)
    plain_TD = backend(experts, hidden_TD, indices_TK, torch.ones(10, 1))
    experts.has_post_expert_norm, experts.post_expert_norm = True, torch.nn.RMSNorm(8)
    out_TD = backend(experts, hidden_TD, indices_TK, weights_TK)
    torch.testing.assert_close(out_TD, 0.5 * experts.post_expert_norm(plain_TD))


@every_backend
def test_the_arguments_are_left_as_they_were(backend, generator):
    experts, hidden_TD = Experts(5, 8, 4), torch.randn(10, 8, generator=generator)
    given_ = (hidden_TD, *slots())
    before = [x.clone() for x in given_]
    backend(experts, *given_)
    assert all(torch.equal(x, y) for x, y in zip(given_, before, strict=True))
