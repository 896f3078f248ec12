"""The probe for routers that see the future; the laws have the routers that it must catch."""

import pytest
import torch

from mixtura.core.errors import OptionError
from mixtura.core.selection import SelectionSpec
from mixtura.nn import LinearGate, Router
from mixtura.nn.causality import sees_future
from mixtura.nn.routers.expert_choice import ExpertChoiceRouter
from mixtura.nn.routers.topk_softmax import TopKRouter


@pytest.mark.parametrize("seed", range(4))
def test_finds_it_with_any_seed_in_either_group(seed):
    assert sees_future(ExpertChoiceRouter(8, 4), seed=seed)
    assert sees_future(ExpertChoiceRouter(8, 4, group="batch"), seed=seed)
    assert not sees_future(TopKRouter(8, 4), seed=seed)


def test_leaves_mode_weights_and_random_numbers_alone():
    torch.manual_seed(5)
    router = TopKRouter(8, 4, noise="learned", score="sigmoid").train()
    before = [parameter.clone() for parameter in router.parameters()]
    torch.manual_seed(6)
    expected = torch.rand(3)
    torch.manual_seed(6)
    assert not sees_future(router)
    assert torch.equal(torch.rand(3), expected)
    assert router.training
    assert all(torch.equal(a, b) for a, b in zip(router.parameters(), before, strict=True))


class Random(TopKRouter):
    """Draws its logits, also in evaluation; that is no look at later tokens."""

    def forward(self, hidden_TD):
        return super().forward(torch.rand_like(hidden_TD))


def test_chance_is_no_future():
    assert not sees_future(Random(8, 4), dim=8)


def test_a_router_without_a_configuration_needs_dim():
    router = Router(LinearGate(8, 4), SelectionSpec(k=2), 4)
    with pytest.raises(OptionError, match="Router has no configuration that names its dim: give dim"):
        sees_future(router)
    assert not sees_future(router, dim=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_models_of_any_type(dtype):
    assert sees_future(ExpertChoiceRouter(8, 4).to(dtype))
    assert not sees_future(TopKRouter(8, 4).to(dtype))


def test_a_router_without_values_is_tried_by_its_configuration():
    with torch.device("meta"):
        leaking, causal = ExpertChoiceRouter(8, 4), TopKRouter(8, 4)
    assert sees_future(leaking)
    assert not sees_future(causal)
    assert next(causal.parameters()).is_meta
