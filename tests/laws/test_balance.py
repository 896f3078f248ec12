"""Laws of every registered balance loss: a scalar of one layer's routing that reads real tokens alone.

T tokens, E experts, K slots a token.
"""

import inspect

import pytest
import torch

from laws.building import key, rows
from mixtura.core.errors import ShapeError
from mixtura.core.routing import Routing
from mixtura.core.selection import SelectionSpec, select

every_loss = pytest.mark.parametrize("row", rows("balance"), ids=key)


def routed(generator, T=12, E=6, k=2):
    """A routing whose logits take gradient."""
    return select(torch.randn(T, E, generator=generator).requires_grad_(), SelectionSpec(k=k))


@every_loss
def test_is_a_finite_scalar_with_gradient_to_the_logits(row, generator):
    routing = routed(generator)
    loss = row(routing)
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
    padded = Routing(padded[0].requires_grad_(), *padded[1:])
    alone, masked = row(real), row(padded, mask_T=mask_T)
    alone.backward()
    masked.backward()
    assert torch.equal(masked, alone)
    assert torch.equal(padded.logits_TE.grad[mask_T], real.logits_TE.grad)
    assert not padded.logits_TE.grad[~mask_T].any()


@every_loss
def test_a_full_mask_is_no_mask(row, generator):
    routing = routed(generator)
    assert torch.equal(row(routing, mask_T=torch.ones(12, dtype=torch.bool)), row(routing))


@every_loss
def test_is_zero_when_no_token_counts(row, generator):
    assert row(routed(generator), mask_T=torch.zeros(12, dtype=torch.bool)).item() == 0
    assert row(routed(generator, T=0)).item() == 0


@every_loss
@pytest.mark.parametrize("mask_T", [torch.ones(12, dtype=torch.int64), torch.ones(11, dtype=torch.bool)], ids=str)
def test_a_mask_that_is_not_one_boolean_a_token_is_refused(row, mask_T, generator):
    with pytest.raises(ShapeError, match="mask_T must be boolean"):
        row(routed(generator), mask_T=mask_T)


@every_loss
def test_does_not_depend_on_the_order_of_tokens_or_experts(row, generator):
    routing = routed(generator)
    tokens_T, experts_E = torch.randperm(12, generator=generator), torch.randperm(6, generator=generator)
    torch.testing.assert_close(row(Routing(*(x[tokens_T] for x in routing))), row(routing))
    permuted = select(routing.logits_TE[:, experts_E], SelectionSpec(k=2))
    torch.testing.assert_close(row(permuted), row(routing))


@every_loss
def test_is_computed_in_float32(row, generator):
    low_TE = torch.randn(12, 6, generator=generator).bfloat16()
    spec = SelectionSpec(k=2)
    assert torch.equal(row(select(low_TE, spec)), row(select(low_TE.float(), spec)))


@every_loss
def test_takes_the_routing_and_a_mask(row):
    assert list(row.options)[:2] == ["routing", "mask_T"]
    assert row.options["mask_T"].kind is inspect.Parameter.KEYWORD_ONLY
