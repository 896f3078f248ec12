"""Capture, replay and steer of compiled models, whether hooks came before or after the compilation."""

import numpy as np
import pytest
import torch

from mixtura.steering import steer
from mixtura.traces.capture import capture
from mixtura.traces.replay import replay
from pico import tokens
from pico_native import native
from traces.situations import break_gates, ours, spread

MODELS = {
    "ours": lambda: ours(layers=(0,), num_hidden_layers=1),
    "olmoe": lambda: spread(native("olmoe", num_hidden_layers=1)),
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_compiled_models_are_seen_replayed_and_steered(name):
    plain, model, x = MODELS[name](), MODELS[name](), tokens()
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x).logits
    with capture(compiled) as trace:
        assert torch.equal(compiled(x).logits, expected)
    with capture(plain) as wanted:
        plain(x)
    for column in wanted.columns:
        assert np.array_equal(getattr(trace, column), getattr(wanted, column)), column
    with steer(model, off=[1]), steer(plain, off=[1]):
        assert torch.equal(compiled(x).logits, plain(x).logits)
    break_gates(model)
    with replay(model, trace):
        assert torch.equal(compiled(x).logits, expected)


@torch.no_grad()
def test_code_that_was_compiled_for_a_model_without_hooks_is_not_used_for_one_with():
    first, second, x = MODELS["olmoe"](), MODELS["olmoe"](), tokens()
    torch.compile(first, backend="eager")(x)
    with capture(second) as trace:
        torch.compile(second, backend="eager")(x)
    assert len(trace) == 18 * 2
