"""Laws of every registered form of experts.

T tokens, D width, E experts, K slots a token.
"""

import json

import pytest
import torch

from laws.building import SIZES, build, key, rows, tokens
from mixtura.core import registry
from mixtura.nn import ExpertGroup

every_form = pytest.mark.parametrize("row", rows("experts"), ids=key)
T, E, K = 12, SIZES["num_experts"], 3


def slots(generator):
    """Indices (T, K) with empty slots and an idle expert, the last one, and weights (T, K)."""
    indices_TK = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(T)])
    indices_TK[torch.rand(T, K, generator=generator) < 0.25] = E
    indices_TK[4] = E
    return indices_TK, torch.rand(T, K, generator=generator).masked_fill(indices_TK == E, 0)


def one_by_one(experts, hidden_TD, indices_TK, weights_TK):
    """The formula: for each token and filled slot, weight times that expert alone on that token alone."""
    out_TD = torch.zeros_like(hidden_TD)
    for t in range(len(hidden_TD)):
        for e, w in zip(indices_TK[t].tolist(), weights_TK[t], strict=True):
            if e < experts.num_experts:
                alone = experts(hidden_TD[t : t + 1], torch.tensor([[e]]), torch.ones(1, 1))[0]
                out_TD[t] = out_TD[t] + w * alone
    return out_TD


@every_form
def test_equal_the_formula(row, generator):
    experts, hidden_TD = build(row), tokens(generator)
    indices_TK, weights_TK = slots(generator)
    out_TD = experts(hidden_TD, indices_TK, weights_TK)
    torch.testing.assert_close(out_TD, one_by_one(experts, hidden_TD, indices_TK, weights_TK), rtol=1e-5, atol=1e-6)
    assert not out_TD[4].any()


@every_form
def test_are_linear_in_the_weights(row, generator):
    experts, hidden_TD = build(row), tokens(generator)
    indices_TK, one_TK = slots(generator)
    other_TK = torch.randn(T, K, generator=generator).masked_fill(indices_TK == E, 0)
    mixed = experts(hidden_TD, indices_TK, 2 * one_TK - 3 * other_TK)
    apart = 2 * experts(hidden_TD, indices_TK, one_TK) - 3 * experts(hidden_TD, indices_TK, other_TK)
    torch.testing.assert_close(mixed, apart, rtol=1e-5, atol=1e-5)


@every_form
def test_do_not_depend_on_the_order_of_slots(row, generator):
    experts, hidden_TD = build(row), tokens(generator)
    indices_TK, weights_TK = slots(generator)
    order_K = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        experts(hidden_TD, indices_TK[:, order_K], weights_TK[:, order_K]), experts(hidden_TD, indices_TK, weights_TK)
    )


@every_form
def test_an_index_twice_is_the_sum_of_its_weights(row, generator):
    experts, hidden_TD = build(row), tokens(generator)
    twice = experts(hidden_TD, torch.ones(T, 2, dtype=torch.int64), torch.tensor([[0.25, 0.5]]).expand(T, 2))
    once = experts(hidden_TD, torch.ones(T, 1, dtype=torch.int64), torch.full((T, 1), 0.75))
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6)


@every_form
def test_the_weight_of_an_empty_slot_counts_for_nothing(row, generator):
    experts, hidden_TD = build(row), tokens(generator)
    indices_TK, weights_TK = slots(generator)
    heavy_TK = weights_TK.masked_fill(indices_TK == E, 7.0).requires_grad_()
    out_TD = experts(hidden_TD, indices_TK, heavy_TK)
    torch.testing.assert_close(out_TD, experts(hidden_TD, indices_TK, weights_TK))
    if out_TD.requires_grad:
        (gradient_TK,) = torch.autograd.grad(out_TD.sum(), heavy_TK, allow_unused=True)
        assert gradient_TK is None or not gradient_TK[indices_TK == E].any()


@every_form
def test_no_token_and_no_slot(row, generator):
    experts = build(row)
    nothing = torch.zeros(0, K)
    assert experts(tokens(generator, T=0), nothing.long(), nothing).shape == (0, SIZES["dim"])
    empty_TK = torch.full((T, K), E)
    assert not experts(tokens(generator), empty_TK, torch.zeros(T, K)).any()


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keep_the_type_of_the_tokens(row, dtype, generator):
    experts, hidden_TD = build(row), tokens(generator)
    indices_TK, weights_TK = slots(generator)
    expected_TD = experts(hidden_TD, indices_TK, weights_TK)
    for weight_dtype in (dtype, torch.float32):
        out_TD = experts.to(dtype)(hidden_TD.to(dtype), indices_TK, weights_TK.to(weight_dtype))
        assert out_TD.dtype == dtype
        torch.testing.assert_close(out_TD.float(), expected_TD, rtol=0.05, atol=0.05)


@every_form
def test_work_under_autocast(row, generator):
    experts, hidden_TD = build(row), tokens(generator)
    indices_TK, weights_TK = slots(generator)
    expected_TD = experts(hidden_TD, indices_TK, weights_TK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_TD = experts(hidden_TD, indices_TK, weights_TK)
    assert out_TD.dtype == torch.float32
    torch.testing.assert_close(out_TD, expected_TD, rtol=0.05, atol=0.05)


@every_form
def test_gradients_are_right(row, generator):
    experts, hidden_TD = build(row).double(), tokens(generator, T=4).double().requires_grad_()
    indices_TK, weights_TK = slots(generator)
    weights_TK = weights_TK[:4].double().requires_grad_()
    names = [name for name, _ in experts.named_parameters()]

    def function(hidden_TD, weights_TK, *parameters):
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(experts, given, (hidden_TD, indices_TK[:4], weights_TK)) + 0 * hidden_TD

    assert torch.autograd.gradcheck(function, (hidden_TD, weights_TK, *experts.parameters()))


@every_form
def test_an_idle_expert_gets_no_gradient(row, generator):
    experts, hidden_TD = build(row), tokens(generator)
    out_TD = experts(hidden_TD, *slots(generator))
    parameters = dict(experts.named_parameters())
    if parameters:
        out_TD.square().sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad[:-1].any(), name
        assert not parameter.grad[-1].any(), name


@every_form
def test_a_group_of_one_kind_is_that_kind(row, generator):
    """Two forms side by side answer what each answers for its own range of indices."""
    left, right, hidden_TD = build(row), build(row), tokens(generator)
    group = ExpertGroup([left, right])
    indices_TK, weights_TK = slots(generator)
    shifted_TK = torch.where(indices_TK == E, 2 * E, indices_TK + E)
    assert torch.equal(group(hidden_TD, shifted_TK, weights_TK), right(hidden_TD, indices_TK, weights_TK))


@every_form
def test_the_configuration_builds_an_equal_one(row, generator):
    experts, hidden_TD = build(row), tokens(generator)
    config = json.loads(json.dumps(experts.method_config))
    other = registry.build(config)
    assert other.method_config == config
    other.load_state_dict(experts.state_dict())
    routed = slots(generator)
    assert torch.equal(other(hidden_TD, *routed), experts(hidden_TD, *routed))
