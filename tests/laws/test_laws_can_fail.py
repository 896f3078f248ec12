"""The laws are worth something: each of these broken methods is caught by the law it breaks.

T tokens, D width, E experts, K slots a token.
"""

import pytest
import torch

from laws import test_backends, test_balance, test_experts, test_routers
from mixtura.core.errors import ShapeError
from mixtura.core.registry import Method, _remember_arguments
from mixtura.core.routing import Routing
from mixtura.core.selection import select
from mixtura.nn import Experts
from mixtura.nn.backends import sorted_backend
from mixtura.nn.routers.base import without_padding
from mixtura.nn.routers.hash_routing import HashRouter
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.nn.state import current_state


class SeesItsMates(TopKRouter):
    """Its logits depend on the whole batch."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)

    def forward(self, hidden_TD):
        return super().forward(hidden_TD - hidden_TD.mean(0))


class IgnoresPadding(TopKRouter):
    """Its mask is never read."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)

    def forward(self, hidden_TD):
        return select(self.gate(hidden_TD), self.spec)


class TiesToTheHighest(TopKRouter):
    """Its indices are turned around before they are chosen."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)

    def forward(self, hidden_TD):
        logits_TE, weights_TK, indices_TK = super().forward(hidden_TD)
        return Routing(logits_TE.flip(-1), weights_TK, self.num_experts - 1 - indices_TK)


class DetachedGate(TopKRouter):
    """Its weights have no gradient."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)

    def forward(self, hidden_TD):
        logits_TE, weights_TK, indices_TK = super().forward(hidden_TD)
        return Routing(logits_TE, weights_TK.detach() + 0 * logits_TE.sum(), indices_TK)


class LooksAhead(TopKRouter):
    """A token is routed by the token after it, a little."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)

    def forward(self, hidden_TD):
        return super().forward(hidden_TD + 1e-4 * hidden_TD.roll(-1, 0))


class LooksAtTheLength(TopKRouter):
    """Its logits grow with the number of real tokens."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)

    def forward(self, hidden_TD):
        state = current_state()
        real = len(hidden_TD) if state.mask_T is None else int(state.mask_T.sum())
        return super().forward(hidden_TD * real)


class LooksAtLaterIds(TopKRouter):
    """Its logits depend on how often an id occurs in the call."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)

    def forward(self, hidden_TD):
        token_T = current_state().token_T
        return super().forward(hidden_TD * (token_T[:, None] == token_T).sum(1, keepdim=True))


class LooksThroughTheTape(TopKRouter):
    """It adds what the mixture before had for later tokens."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)

    def forward(self, hidden_TD):
        before_TE = current_state().tape.before("").logits_TE
        return without_padding(select(self.gate(hidden_TD) + before_TE.mean(0), self.spec))


class HasGradientWithoutParameters(HashRouter):
    """A table that is chosen by ids, and weighs by the tokens."""

    def __init__(self, dim: int, num_experts: int, vocabulary: int) -> None:
        super().__init__(dim, num_experts, vocabulary)

    def forward(self, hidden_TD):
        logits_TE, weights_TK, indices_TK = super().forward(hidden_TD)
        return Routing(logits_TE, weights_TK * hidden_TD[:, :1], indices_TK)


class SquaredWeights(Experts):
    """Not linear in the weights."""

    def __init__(self, num_experts: int, dim: int, width: int) -> None:
        super().__init__(num_experts, dim, width)

    def forward(self, hidden_TD, indices_TK, weights_TK):
        return super().forward(hidden_TD, indices_TK, weights_TK**2)


LEAKS = (SeesItsMates, LooksAhead, LooksAtTheLength, LooksAtLaterIds, LooksThroughTheTape)
OTHERS = (IgnoresPadding, TiesToTheHighest, DetachedGate, HasGradientWithoutParameters, SquaredWeights)
for _cls in (*LEAKS, *OTHERS):
    _remember_arguments(_cls, _cls.__name__)


def declares_whether_it_sees_the_future(row, generator):
    test_routers.test_declares_whether_it_sees_the_future(row)


@pytest.mark.parametrize(
    ("law", "cls"),
    [
        (test_routers.test_does_not_see_batch_mates_unless_it_says_so, SeesItsMates),
        (test_routers.test_keeps_padding_out, SeesItsMates),
        (test_routers.test_padding_is_never_read, SeesItsMates),
        (test_routers.test_keeps_padding_out, IgnoresPadding),
        (test_routers.test_ties_go_to_the_lowest_index, TiesToTheHighest),
        (test_routers.test_permutes_with_its_experts, TiesToTheHighest),
        (test_routers.test_passes_gradient_to_its_gate, DetachedGate),
        (test_routers.test_a_router_without_parameters_has_nothing_to_train, HasGradientWithoutParameters),
        *((declares_whether_it_sees_the_future, cls) for cls in LEAKS),
        (test_experts.test_equal_the_formula, SquaredWeights),
        (test_experts.test_are_linear_in_the_weights, SquaredWeights),
        (test_experts.test_an_index_twice_is_the_sum_of_its_weights, SquaredWeights),
    ],
    ids=lambda part: part.__name__,
)
def test_a_broken_method_breaks_its_law(law, cls, generator):
    with pytest.raises(AssertionError):
        law(Method(cls.__name__, "test", cls), generator)


def padding_counts(routing: Routing, *, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """A loss that multiplies by the mask instead of leaving padding out."""
    z_T = routing.logits_TE.logsumexp(-1)
    return (z_T if mask_T is None else z_T * mask_T).square().mean()


def test_a_loss_that_reads_padding_is_caught(generator):
    with pytest.raises(AssertionError):
        test_balance.test_masked_tokens_change_no_bit(Method("padding", "balance", padding_counts), generator)
    with pytest.raises((AssertionError, ShapeError, RuntimeError)):
        test_balance.test_is_zero_when_no_token_counts(Method("padding", "balance", padding_counts), generator)


def drops_the_last(experts, hidden_TD, indices_TK, weights_TK):
    """A backend that forgets the last slot of every token."""
    return sorted_backend(experts, hidden_TD, indices_TK[:, :-1], weights_TK[:, :-1])


def multiplies_by_zero(experts, hidden_TD, indices_TK, weights_TK):
    """A backend that computes empty slots and multiplies them by 0."""
    E = experts.num_experts
    return sorted_backend(experts, hidden_TD, indices_TK.clamp(max=E - 1), weights_TK.masked_fill(indices_TK >= E, 0))


def test_a_broken_backend_is_caught(generator):
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        test_backends.test_agrees_with_the_loops(drops_the_last)
    with pytest.raises(AssertionError):
        test_backends.test_tokens_without_a_slot_are_never_read(multiplies_by_zero, {}, generator)
