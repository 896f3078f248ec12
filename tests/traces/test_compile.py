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


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
def test_native_models_that_were_compiled_without_hooks():
    """Also if the code was compiled for another model of the class, whose hooks torch does not compare."""
    other, model, plain = (spread(native("olmoe", num_hidden_layers=1)) for _ in range(3))
    compiled, x = torch.compile(model, backend="eager"), tokens()
    expected = torch.compile(other, backend="eager")(x).logits
    assert torch.equal(compiled(x).logits, expected)
    check(model, compiled, plain, expected)


@torch.no_grad()
def test_models_of_ours_that_were_compiled_with_hooks():
    model, plain = (ours(layers=(0,), num_hidden_layers=1) for _ in range(2))
    for one in (model, plain):  # a compiled model takes torch, so the other one does too
        one.set_experts_implementation("mixtura_sorted")
    compiled = torch.compile(model, backend="eager")
    check(model, compiled, plain, compiled(tokens()).logits)


def check(model, compiled, plain, expected):
    """Seen, steered and replayed as a model that is not compiled."""
    x = tokens()
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
