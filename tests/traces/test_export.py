"""A model with hooks is exported as it is, steered if it is steered, and no trace is made of that."""

import pytest
import torch

from mixtura.core import MixturaWarning, NotExpressibleError
from mixtura.nn import current_state
from mixtura.steering import steer
from mixtura.traces.capture import capture
from mixtura.traces.replay import replay
from pico import tokens
from pico_native import native
from traces.situations import ours, spread

MODELS = {"ours": lambda: ours(layers=(0,)), "olmoe": lambda: spread(native("olmoe"))}


def exported(model):
    return torch.export.export(model, (tokens(),), {"use_cache": False}, strict=False).module()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_exported_models(name):
    model, x = MODELS[name](), tokens()
    model.set_experts_implementation("batched_mm")
    with capture(model) as trace:
        expected = model(x, use_cache=False).logits
    assert torch.equal(exported(model)(x, use_cache=False).logits, expected)
    with steer(model, off=[1], bias={2: 0.5}):
        changed = model(x, use_cache=False).logits
        program = exported(model)
    assert not torch.equal(changed, expected)
    assert torch.equal(program(x, use_cache=False).logits, changed)
    with pytest.warns(MixturaWarning, match="no forward call"), capture(model):
        exported(model)
    with pytest.raises(NotExpressibleError, match="exported inside of replay"), replay(model, trace):
        exported(model)
    assert current_state() is None
