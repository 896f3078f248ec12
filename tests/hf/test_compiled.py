"""State and tape under torch.compile, torch.export and DistributedDataParallel: as without."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mixtura.hf import convert, record
from mixtura.hf.balance import Balancer
from mixtura.nn import Experts, Mixture
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico, tokens

TERMS = {"load-balancing": 1.0, "router-z-loss": 0.1}


def own():
    model = pico("llama")
    return convert(model, {i: Mixture(TopKRouter(32, 4), Experts(4, 32, 16)) for i in (0, 2)})


every_model = pytest.mark.parametrize("make", [own, lambda: pico("olmoe")], ids=["own", "native"])


def batch():
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    return ids, mask


def gradients(model, call):
    """Gradients of a loss of logits and tape, and what was on the tape."""
    ids, mask = batch()
    model.zero_grad()
    balancer = Balancer(model, TERMS, "micro-batch-load")
    balancer.begin_step(int(mask.sum()))
    with record(model) as states:
        logits = call(ids, attention_mask=mask, use_cache=False).logits
    loss, _ = balancer.loss(states)
    (loss + logits[mask.bool()].square().mean()).backward()
    balancer.check_tokens()
    decisions = [(r.layer, r.routing.indices_TK, r.routing.weights_TK.detach()) for r in states[0].tape.records]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, decisions


def assert_same(found, expected):
    for (layer, indices, weights), (layer_, indices_, weights_) in zip(found[1], expected[1], strict=True):
        assert layer == layer_
        assert torch.equal(indices, indices_)
        torch.testing.assert_close(weights, weights_)
    assert found[0].keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@every_model
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_before_anyone_listened(make, checkpointing):
    model = make().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    expected = gradients(model, model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batch()[0], use_cache=False)
    assert_same(gradients(model, compiled), expected)


def test_compiled_as_a_whole_is_refused_with_the_reason():
    torch._dynamo.reset()
    compiled = torch.compile(own(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        compiled(batch()[0], use_cache=False)


@every_model
def test_exported(make):
    """A program of its own: it has no state, and the same logits."""
    model = make()
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        expected = model(tokens(), use_cache=False).logits
        program = torch.export.export(model, (tokens(),), {"use_cache": False}, strict=False)
        torch.testing.assert_close(program.module()(tokens(), use_cache=False).logits, expected)
        other = tokens(seed=5)
        torch.testing.assert_close(
            program.module()(other, use_cache=False).logits, model(other, use_cache=False).logits
        )


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@every_model
def test_wrapped_for_several_processes(make, one_process):
    model = make()
    expected = gradients(model, model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    ids, mask = batch()
    with record(wrapped) as states:
        wrapped(ids, attention_mask=mask, use_cache=False)
    assert len(states) == 1
    assert_same(gradients(model, wrapped), expected)
