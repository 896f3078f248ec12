"""Laws of every registered router.

T tokens, D width, E experts, K slots a token.
"""

import json

import pytest
import torch

from laws.building import SIZES, build, ids, key, kinds, permuted, route, rows, tokens
from mixtura.core import registry
from mixtura.core import routing as r
from mixtura.core.errors import ShapeError
from mixtura.nn.causality import sees_future

every_router = pytest.mark.parametrize("row", rows("router"), ids=key)
LEARNED = [row for row in rows("router") if any(True for _ in build(row).parameters())]
FIXED = [row for row in rows("router") if row not in LEARNED]
every_learned_router = pytest.mark.parametrize("row", LEARNED, ids=key)


def equal(one, other):
    """Whether two routings are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every_router
def test_keeps_the_contract(row, generator):
    router = build(row)
    routing = r.check(route(router, tokens(generator)))
    assert routing.num_experts == router.num_experts >= SIZES["num_experts"]
    assert routing.indices_TK.shape == (12, router.slots)
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    assert routing.indices_TK.dtype == torch.int64
    assert (routing.indices_TK < routing.num_experts).any()


@every_router
def test_routes_no_token(row, generator):
    router = build(row)
    assert r.check(route(router, tokens(generator, T=0))).indices_TK.shape == (0, router.slots)


@every_router
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decides_in_float32(row, dtype, generator):
    """Also in a model of lower precision and under autocast, where the gate's logits are those of float32."""
    router, hidden_TD = build(row), tokens(generator).to(dtype)
    expected = route(router, hidden_TD.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(route(router, hidden_TD), expected)
    low = route(build(row).to(dtype), hidden_TD)
    assert low.logits_TE.dtype == low.weights_TK.dtype == torch.float32


@every_router
def test_keeps_padding_out(row, generator):
    router, hidden_TD = build(row), tokens(generator)
    mask_T = torch.arange(len(hidden_TD)) % 3 != 0
    routing = r.check(route(router, hidden_TD, mask_T))
    alone = route(router, hidden_TD[mask_T], token_T=ids(len(hidden_TD))[mask_T])
    assert (routing.indices_TK[~mask_T] == routing.num_experts).all()
    assert torch.equal(routing.indices_TK[mask_T], alone.indices_TK)
    torch.testing.assert_close(routing.weights_TK[mask_T], alone.weights_TK)


@every_router
def test_padding_is_never_read(row, generator):
    router, hidden_TD = build(row), tokens(generator)
    mask_T = torch.arange(len(hidden_TD)) % 3 != 0
    poisoned_TD = hidden_TD.masked_fill(~mask_T[:, None], torch.nan)
    clean, poisoned = route(router, hidden_TD, mask_T), route(router, poisoned_TD, mask_T)
    assert torch.equal(poisoned.indices_TK, clean.indices_TK)
    assert torch.equal(poisoned.weights_TK, clean.weights_TK)


@every_router
def test_a_mask_of_another_length_is_refused(row, generator):
    with pytest.raises(ShapeError, match=r"mask_T must be boolean of shape \(12,\)"):
        route(build(row), tokens(generator), torch.ones(5, dtype=torch.bool))


@every_router
def test_is_deterministic(row, generator):
    hidden_TD = tokens(generator)
    router = build(row).eval()
    assert equal(route(router, hidden_TD), route(router, hidden_TD))
    assert equal(route(router, hidden_TD), route(build(row).eval(), hidden_TD))


@every_learned_router
def test_ties_go_to_the_lowest_index(row, generator):
    """A gate without weights finds all experts equal."""
    router = build(row)
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
    routing = route(router, tokens(generator))
    filled_TK = routing.indices_TK < routing.num_experts
    assert torch.equal(routing.indices_TK[filled_TK], torch.arange(filled_TK.shape[1]).expand_as(filled_TK)[filled_TK])


@every_router
def test_does_not_see_batch_mates_unless_it_says_so(row, generator):
    """And so it is causal, which is what a language model may use."""
    router, hidden_TD = build(row).eval(), tokens(generator)
    whole = route(router, hidden_TD)
    parts = [route(router, hidden_TD[: t + 1]) for t in range(len(hidden_TD))]
    same = all(torch.equal(part.indices_TK[t], whole.indices_TK[t]) for t, part in enumerate(parts))
    assert same == row.causal


@every_router
def test_declares_whether_it_sees_the_future(row):
    assert sees_future(build(row)) != row.causal


@every_router
def test_permutes_with_its_experts(row, generator):
    router, hidden_TD = build(row), tokens(generator)
    order_E = kinds(router.num_experts, 0 if router.spec is None else router.spec.null_experts)
    gates_TE = r.dense(route(router, hidden_TD))
    permuted_TE = r.dense(route(permuted(router, order_E), hidden_TD, order_E=order_E))
    torch.testing.assert_close(permuted_TE, gates_TE[:, order_E])


@every_learned_router
def test_passes_gradient_to_its_gate(row, generator):
    router = build(row)
    weights_TK = route(router, tokens(generator)).weights_TK
    (weights_TK * torch.randn(weights_TK.shape, generator=generator)).sum().backward()
    for name, parameter in router.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@every_router
def test_its_configuration_builds_an_equal_one(row, generator):
    router, hidden_TD = build(row).eval(), tokens(generator)
    config = json.loads(json.dumps(router.method_config))
    other = registry.build(config).eval()
    assert other.method_config == config
    other.load_state_dict(router.state_dict())
    assert equal(route(router, hidden_TD), route(other, hidden_TD))


@pytest.mark.parametrize("row", FIXED, ids=key)
def test_a_router_without_parameters_has_nothing_to_train(row, generator):
    """Its weights have no graph, and so a training loop is told that no gradient goes there."""
    routing = route(build(row), tokens(generator).requires_grad_())
    assert not routing.weights_TK.requires_grad
    assert not routing.logits_TE.requires_grad
