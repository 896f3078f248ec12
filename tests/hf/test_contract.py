"""The contract of the two seams is found by a run of the model, whatever the table of families says."""

import pytest
import torch

from mixtura.core.errors import NotExpressibleError
from mixtura.hf import contract
from mixtura.hf.install import install
from mixtura.hf.native import expert_blocks
from pico_native import native


@pytest.mark.parametrize("model_type", ["inkling_text", "zaya"])
def test_families_that_nobody_listed_are_found_out(model_type, monkeypatch):
    monkeypatch.setattr(contract, "OUTSIDE", {})
    with pytest.raises(NotExpressibleError, match=f"{model_type}: layer 0: its router gives 4, not three results"):
        install(native(model_type), "topk-softmax")


@pytest.mark.parametrize("model_type", ["dbrx", "doge", "jetmoe", "llama4_text", "longcat_flash"])
def test_experts_that_are_not_decorated_are_none(model_type, monkeypatch):
    monkeypatch.setattr(contract, "OUTSIDE", {})
    with pytest.raises(NotExpressibleError, match=f"{model_type} has no experts that transformers decorates"):
        install(native(model_type), "topk-softmax")


def broken(part, change):
    """A Mixtral whose layer 1 does something else between router and experts."""
    model = native("mixtral")
    block = expert_blocks(model)["1"]
    if part == "router":
        block.router.register_forward_hook(lambda module, args, out: change(*out))
    else:
        block.experts.register_forward_pre_hook(lambda module, args: change(*args))
    return model


BROKEN = {
    "columns": ("router", lambda logits, weights, indices: (logits[:, :3], weights, indices)),
    "weights": ("experts", lambda hidden, indices, weights: (hidden, indices, 2 * weights)),
    "indices": ("experts", lambda hidden, indices, weights: (hidden, indices.flip(1), weights)),
}
MESSAGES = {
    "columns": "its router does not give logits, weights and indices",
    "weights": "its experts do not get what its router gives",
    "indices": "its experts do not get what its router gives",
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_breaks_the_contract_is_named_with_its_layer(what):
    with pytest.raises(NotExpressibleError, match=f"mixtral: layer 1: {MESSAGES[what]}"):
        install(broken(*BROKEN[what]), "topk-softmax")


def test_a_mixture_that_is_not_called_is_named():
    model = native("mixtral")
    blocks = expert_blocks(model)
    with pytest.raises(NotExpressibleError, match="layer 0: its mixture was not called"), contract.watch(model, blocks):
        pass


def test_nothing_is_left_behind():
    model = native("mixtral")
    blocks = expert_blocks(model)
    with contract.watch(model, blocks) as seen:
        model(torch.tensor([[3, 4, 5]]), use_cache=False)
    assert seen == {"0": contract.Seen(dim=32, k=2), "1": contract.Seen(dim=32, k=2)}
    for block in blocks.values():
        assert not block.router._forward_hooks
        assert not block.experts._forward_hooks
