"""Every native mixture that can be built small: saved and loaded bit-equal as it is and with a router of ours in it."""

import json
from pathlib import Path

import pytest
import torch

from mixtura.core.errors import NotExpressibleError
from mixtura.hf import record
from mixtura.hf.contract import OUTSIDE as REASONS
from mixtura.hf.install import install
from mixtura.hf.modeling import routers
from mixtura.hf.native import native_mixtures
from mixtura.traces.capture import capture
from mixtura.traces.replay import replay
from pico_native import FAMILIES, OUTSIDE, facts, logits, native, reloaded, tokens

FACTS = json.loads((Path(__file__).parents[2] / "docs" / "native_families.json").read_text(encoding="utf-8"))
INSTALLABLE = sorted(name for name, row in FACTS.items() if not row["refused"])


def assert_equal(one, other):
    """Class, and every tensor by name."""
    assert type(one) is type(other)
    state, again = one.state_dict(), other.state_dict()
    assert state.keys() == again.keys()
    assert [name for name in state if not torch.equal(state[name], again[name])] == []


def test_there_are_many():
    assert set(FACTS) == {*FAMILIES, *OUTSIDE}
    assert len(FAMILIES) >= 50
    assert len(INSTALLABLE) >= 50
    assert sum(row["same"] != "" for row in FACTS.values()) >= 44


@pytest.mark.parametrize("model_type", sorted(FACTS))
def test_the_table_of_the_docs_is_true(model_type):
    assert facts(model_type) == FACTS[model_type]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_native_saved_and_loaded_bit_equal(model_type, tmp_path):
    model, x = native(model_type), tokens()
    loaded = reloaded(model, tmp_path)
    assert_equal(model, loaded)
    assert torch.equal(logits(loaded, x), logits(model, x))


@pytest.mark.parametrize("model_type", INSTALLABLE)
def test_installed_saved_and_loaded_bit_equal(model_type, tmp_path):
    model, _ = install(
        native(model_type), "topk-softmax", start="random", k=1, score="sigmoid", renormalize=None, bias=True
    )
    for router in routers(model).values():
        torch.nn.init.normal_(router.gate.bias)
    x = tokens()
    mask = torch.ones_like(x)
    mask[0, 5:] = 0
    loaded = reloaded(model, tmp_path)
    assert loaded.config.model_type == "mixtura"
    assert_equal(model, loaded)
    with record(loaded) as states:
        again = logits(loaded, x, attention_mask=mask)
    assert torch.equal(again, logits(model, x, attention_mask=mask))
    assert [record.layer for record in states[0].tape.records] == list(routers(model))
    for _, routing in states[0].tape.records:
        assert torch.equal(routing.indices_TK[:, 0] == routing.num_experts, mask.reshape(-1) == 0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_replayed_bit_equal(model_type):
    """Also where the routers have forgotten what they learned."""
    model, x = native(model_type), tokens()
    with capture(model) as trace:
        before = logits(model, x)
    if model_type in INSTALLABLE:  # the others give their blocks more than the decision
        for block in native_mixtures(model).values():
            for parameter in block.router.parameters():
                torch.nn.init.normal_(parameter)
        assert not torch.equal(logits(model, x), before)
    with replay(model, trace):
        assert torch.equal(logits(model, x), before)


@pytest.mark.parametrize("model_type", sorted(name for name, row in FACTS.items() if row["refused"]))
def test_a_family_outside_is_refused_by_name_and_left_alone(model_type):
    model, x = native(model_type), tokens()
    before = logits(model, x)
    with pytest.raises(NotExpressibleError, match=f"{model_type}: {REASONS[model_type]}"):
        install(model, "topk-softmax")
    assert torch.equal(logits(model, x), before)
