"""Laws of every registered balance loss: a scalar of one layer's routing that reads real tokens alone.

T tokens, E experts, K slots a token.
"""

import inspect

import pytest
import torch

from laws.building import SIZES, bound, key, kinds, rows
from mixtura.core.errors import ShapeError
from mixtura.core.routing import Routing
from mixtura.core.selection import SelectionSpec, select

every_loss = pytest.mark.parametrize("row", rows("balance"), ids=key)


def routed(generator, T=12, E=6, k=2):
    """A routing whose logits take gradient."""
    return select(torch.randn(T, E, generator=generator).requires_grad_(), SelectionSpec(k=k))


def leaves(routing):
    """The routing with logits and weights that take gradients of their own."""
    logits_TE, weights_TK, indices_TK = routing
    return Routing(logits_TE.detach().requires_grad_(), weights_TK.detach().requires_grad_(), indices_TK)


def gradients(loss, routing):
    """With respect to logits and weights."""
    return torch.autograd.grad(loss, routing[:2], materialize_grads=True)


@every_loss
def test_is_a_finite_scalar_with_gradient_to_the_logits(row, generator):
    routing = routed(generator)
    loss = bound(row)(routing)
    loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert routing.logits_TE.grad.isfinite().all()
    assert routing.logits_TE.grad.any()


@every_loss
def test_masked_tokens_change_no_bit(row, generator):
    """Whatever padding holds, and however much of it there is."""
    real, mask_T = routed(generator), torch.arange(20) % 5 < 3
    padded = [
        torch.full((20, *x.shape[1:]), fill).to(x.dtype) for x, fill in zip(real, (torch.nan, 9.0, 6), strict=True)
    ]
    for whole, part in zip(padded, real, strict=True):
        whole[mask_T] = part.detach()
    real, padded = leaves(real), leaves(padded)
    alone, masked = bound(row)(real), bound(row)(padded, mask_T=mask_T)
    assert torch.equal(masked, alone)
    for ours, theirs in zip(gradients(masked, padded), gradients(alone, real), strict=True):
        assert torch.equal(ours[mask_T], theirs)
        assert not ours[~mask_T].any()


@every_loss
def test_a_full_mask_is_no_mask(row, generator):
    routing = routed(generator)
    assert torch.equal(bound(row)(routing, mask_T=torch.ones(12, dtype=torch.bool)), bound(row)(routing))


@every_loss
def test_is_zero_when_no_token_counts(row, generator):
    assert bound(row)(routed(generator), mask_T=torch.zeros(12, dtype=torch.bool)).item() == 0
    assert bound(row)(routed(generator, T=0)).item() == 0


@every_loss
@pytest.mark.parametrize("mask_T", [torch.ones(12, dtype=torch.int64), torch.ones(11, dtype=torch.bool)], ids=str)
def test_a_mask_that_is_not_one_boolean_a_token_is_refused(row, mask_T, generator):
    with pytest.raises(ShapeError, match="mask_T must be boolean"):
        bound(row)(routed(generator), mask_T=mask_T)


@every_loss
def test_does_not_depend_on_the_order_of_tokens_or_experts(row, generator):
    routing = routed(generator)
    tokens_T = torch.randperm(12, generator=generator)
    # experts of two kinds change places among their own
    last = [
        size for name, size in SIZES.items() if name in row.options and name in ("null_experts", "zero_computation")
    ]
    experts_E = kinds(6, *(last or [0]))
    torch.testing.assert_close(bound(row)(Routing(*(x[tokens_T] for x in routing))), bound(row)(routing))
    permuted = select(routing.logits_TE[:, experts_E], SelectionSpec(k=2))
    torch.testing.assert_close(bound(row)(permuted), bound(row)(routing))


@every_loss
def test_is_computed_in_float32(row, generator):
    low_TE = torch.randn(12, 6, generator=generator).bfloat16()
    spec = SelectionSpec(k=2)
    assert torch.equal(bound(row)(select(low_TE, spec)), bound(row)(select(low_TE.float(), spec)))


@every_loss
def test_takes_the_routing_and_a_mask(row):
    assert list(row.options)[:2] == ["routing", "mask_T"]
    assert row.options["mask_T"].kind is inspect.Parameter.KEYWORD_ONLY
