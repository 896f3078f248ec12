"""A router of ours in a native block: what the block computes, what the tape shows, and what the state changes.

T tokens, K slots a token, E experts of the block.
"""

import pytest
import torch

from mixtura.core.errors import NotExpressibleError, OptionError
from mixtura.core.routing import Routing, check
from mixtura.hf import record
from mixtura.hf.forward import Listener, listen
from mixtura.hf.install import install
from mixtura.hf.modeling import routers
from mixtura.hf.native import expert_blocks
from mixtura.hf.seat import Seat, seats
from mixtura.nn.backends import naive_backend
from mixtura.nn.routers.adamoe import AdaMoERouter
from mixtura.nn.routers.gating_residual import GatingResidualRouter
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.nn.state import RouterState, use_state
from pico_native import logits, native, tokens

E = 4
RAGGED = {
    "topk-softmax": {"k": 3, "renormalize": None},
    "dynamic-top-p": {"p": 0.3},
    "adamoe": {"null_experts": 3, "k": 4},
    "hash-routing": {"hashes": 2},
}


def installed(key="topk-softmax", model_type="qwen3_moe", **options):
    """A model whose routers are far from uniform."""
    model, _ = install(native(model_type), key, start="random", **(options or RAGGED.get(key, {})))
    torch.manual_seed(1)
    for router in routers(model).values():
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def padded():
    x = tokens()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    return x, mask


@pytest.mark.parametrize("backend", ["mixtura", "mixtura_naive", "eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("key", RAGGED)
def test_the_block_computes_the_formula_of_the_tape_on_every_backend(key, backend):
    model = installed(key)
    model.set_experts_implementation(backend)
    x, mask = padded()
    calls = {}
    for layer, block in expert_blocks(model).items():
        keep = lambda module, args, out, layer=layer: calls.update({layer: (args[0].reshape(-1, 32), out)})
        block.block.register_forward_hook(keep)
    poison = [torch.full((1 << 16,), float("nan")) for _ in range(8)]
    del poison
    with record(model) as states:
        model(x, attention_mask=mask, use_cache=False).logits.sum().backward()
    assert [layer for layer, _ in states[0].tape.records] == ["0", "1"]
    for layer, routing in states[0].tape.records:
        assert (routing.indices_TK >= E).any()
        hidden_TD, out = calls[layer]
        expected = naive_backend(expert_blocks(model)[layer].experts, hidden_TD, routing.indices_TK, routing.weights_TK)
        torch.testing.assert_close(out.reshape(-1, 32), expected, rtol=1e-5, atol=1e-6)
    for router in routers(model).values():
        assert all(p.grad.isfinite().all() and p.grad.any() for p in router.parameters())


@pytest.mark.parametrize("key", RAGGED)
def test_gradients_are_those_of_the_eager_loop(key):
    x, mask = padded()
    gradients = []
    for backend in ("mixtura_naive", "grouped_mm"):
        model = installed(key)
        model.set_experts_implementation(backend)
        model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tape_shows_the_routing_of_the_router_once(dtype):
    model = installed("adamoe").to(dtype)
    x, mask = padded()
    with record(model) as states, torch.no_grad():
        model(x, attention_mask=mask)
        model(x)
    assert [[layer for layer, _ in state.tape.records] for state in states] == [["0", "1"]] * 2
    for _, routing in states[0].tape.records:
        check(routing)
        assert routing.num_experts == E + 3
        assert routing.logits_TE.dtype == torch.float32
        assert torch.equal((routing.indices_TK == E + 3).all(1), mask.reshape(-1) == 0)
        assert ((routing.indices_TK >= E) & (routing.indices_TK < E + 3)).any()


def test_the_block_gets_the_triple_that_it_expects():
    seat = Seat(AdaMoERouter(8, E, 3, 4), E, "0")
    torch.nn.init.normal_(seat.router.gate.weight)
    hidden = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    state = RouterState(mask_T=torch.arange(10) != 4)
    with use_state(state):
        logits_TE, weights_TK, indices_TK = seat(hidden, torch.zeros(E), input_ids=None)
    routing = state.tape.records[0].routing
    assert logits_TE is routing.logits_TE
    assert weights_TK.dtype == hidden.dtype
    filled_TK = routing.indices_TK < E
    assert filled_TK.any()
    assert torch.equal(indices_TK[filled_TK], routing.indices_TK[filled_TK])
    assert torch.equal(weights_TK[filled_TK], routing.weights_TK[filled_TK].bfloat16())
    assert (indices_TK[~filled_TK] == E - 1).all()
    assert not weights_TK[~filled_TK].any()


def test_weights_of_experts_that_the_block_has_not_are_0():
    seat = Seat(AdaMoERouter(8, E, 3, 2), E, "0")
    absent_TK, ones_TK = torch.full((6, 2), E + 1), torch.ones(6, 2)
    state = RouterState(edits=[lambda state, layer, routing: Routing(routing.logits_TE, ones_TK, absent_TK)])
    with use_state(state):
        _, weights_TK, indices_TK = seat(torch.randn(6, 8))
    assert not weights_TK.any()
    assert (indices_TK == E - 1).all()


def test_a_router_sees_the_mixture_before_it():
    model = installed("gating-residual", k=2)
    with record(model) as states:
        model(tokens(), use_cache=False)
    first, second = (record.routing.logits_TE for record in states[0].tape.records)
    second.sum().backward()
    gates = [router.gate for router in routers(model).values()]
    assert gates[0].token.weight.grad.any()
    expected = gates[1].residual(first)
    assert not torch.allclose(second, second - expected)


def test_edits_of_the_state_reach_the_block():
    class Only(Listener):
        """Every token to one expert."""

        def opened(self, state, args, kwargs):
            state.edits.append(self.edit)

        def edit(self, state, layer, routing):
            everything = torch.ones_like(routing.weights_TK[:, :1])
            return Routing(routing.logits_TE, everything, torch.full_like(routing.indices_TK[:, :1], 2))

    model, x = installed(), tokens()
    seen = []
    for block in expert_blocks(model).values():
        block.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1:]))
    with listen(model, Only()), record(model) as states:
        edited = logits(model, x)
    assert all((indices == 2).all() and (weights == 1).all() for indices, weights in seen)
    assert all((record.routing.indices_TK == 2).all() for record in states[0].tape.records)
    assert not torch.equal(edited, logits(model, x))


def test_checkpointing_gives_the_same_gradients_and_one_record_a_layer():
    x, gradients = tokens(), []
    for checkpointed in (False, True):
        model = installed("gating-residual", k=2).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with record(model) as states:
            one, two = model(x, labels=x, use_cache=False), model(x.flip(0), labels=x, use_cache=False)
        (one.loss + 2 * two.loss).backward()
        assert [len(state.tape.records) for state in states] == [2, 2]
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padding_in_generation_is_not_routed(cache):
    model = installed()
    x, mask = padded()
    with record(model) as states:
        model.generate(x, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation=cache)
    prefill = states[0].tape.records[0].routing.indices_TK
    assert torch.equal((prefill == E).all(1), mask.reshape(-1) == 0)
    assert all((state.tape.records[0].routing.indices_TK < E).all() for state in states[1:])


def test_under_peft_a_trained_copy_decides_once():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    model = get_peft_model(installed(), config)
    with record(model) as states:
        model(tokens()).logits.sum().backward()
    assert [layer for layer, _ in states[0].tape.records] == ["0", "1"]
    assert all(router.gate.weight.grad.any() for router in routers(model).values())


@pytest.mark.parametrize(
    ("router", "error", "message"),
    [
        (TopKRouter(8, 3), OptionError, "topk-softmax chooses among 3 experts, but the block has 4"),
        (TopKRouter(8, 6), NotExpressibleError, "6 experts, 0 of which answer 0, .* give it as many, or convert"),
        (TopKRouter(8, E, weight_on="input"), NotExpressibleError, "weighs the inputs of experts"),
        (AdaMoERouter(8, 3, 3), OptionError, "among 6 experts, 3 of them null, but the block has 4"),
        (GatingResidualRouter(8, 6, null_experts=2), NotExpressibleError, "8 experts, 2 of which"),
    ],
    ids=["few", "many", "input", "few-true", "many-true"],
)
def test_what_does_not_fit_is_refused_by_name(router, error, message):
    with pytest.raises(error, match=message):
        Seat(router, E, "0")


def test_seats_lie_in_the_place_of_the_native_router():
    model = installed()
    assert list(seats(model)) == ["0", "1"]
    names = [name for name in model.state_dict() if ".gate." in name]
    assert names == [f"model.layers.{layer}.mlp.gate.router.gate.weight" for layer in (0, 1)]
