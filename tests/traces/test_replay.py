"""Replay gives the logits of the recording to the bit, in every situation, also when the gates are others by then."""

import numpy as np
import pytest
import torch

from mixtura.core import MixturaWarning, NotExpressibleError, OptionError, ShapeError
from mixtura.hf import convert, record
from mixtura.hf.native import native_mixtures
from mixtura.hf.selection import layer_selections
from mixtura.nn import Experts, Mixture
from mixtura.nn.routers.hash_routing import HashRouter
from mixtura.traces.capture import capture
from mixtura.traces.replay import replay
from pico import pico, tokens
from pico_native import FAMILIES, native
from traces.situations import MODELS, SITUATIONS, break_gates, left_padded, one_process, ours, spread


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", ["ours", "olmoe"])
def test_situations(name, situation):
    check(MODELS[name](), SITUATIONS[situation])


@pytest.mark.parametrize("situation", ["forward", "dynamic cache"])
@pytest.mark.parametrize("name", sorted(set(MODELS) - {"ours", "olmoe"}))
def test_families(name, situation):
    check(MODELS[name](), SITUATIONS[situation])


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_every_native_family(family):
    model, (x, mask) = spread(native(family)), left_padded()
    with capture(model) as trace:
        expected = model(x, attention_mask=mask, use_cache=False).logits
    mixtures = {} if family == "inkling_text" else native_mixtures(model)  # its router weighs shared experts too
    for mixture in mixtures.values():
        for parameter in mixture.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(model(x, attention_mask=mask, use_cache=False).logits, expected) == (not mixtures)
    with replay(model, trace):
        assert torch.equal(model(x, attention_mask=mask, use_cache=False).logits, expected)


def check(model, situation):
    """What a capture saw is what a replay carries out, and the model by itself would do something else."""
    with capture(model) as trace:
        expected = situation(model)
    break_gates(model)
    other = situation(model)
    assert other.shape != expected.shape or not torch.equal(other, expected)
    with replay(model, trace), capture(model) as again:
        assert torch.equal(situation(model), expected)
    for column in trace.columns:
        assert np.array_equal(getattr(trace, column), getattr(again, column)), column


def gradients(model, x, checkpointed, how):
    """Gradients after two forwards and one backward, and the sum of the losses."""
    model.train().zero_grad()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with how:
        losses = [model(y, labels=x, use_cache=False).loss for y in (x, x.flip(0))]
        sum(losses).backward()
    model.gradient_checkpointing_disable()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, sum(losses).detach()


@pytest.mark.parametrize("name", ["ours", "mixtral", "deepseek_v3"])
def test_checkpointing_with_two_forwards_before_a_backward(name):
    model, x = MODELS[name](), tokens()
    with capture(model) as trace:
        free, loss = gradients(model, x, False, replay_nothing())
    for checkpointed in (False, True):
        learned, again = gradients(model, x, checkpointed, replay(model, trace, weights="recomputed"))
        assert torch.equal(again, loss)
        for parameter, gradient in free.items():
            torch.testing.assert_close(learned[parameter], gradient, msg=parameter)
    break_gates(model)
    frozen = [gradients(model, x, checkpointed, replay(model, trace)) for checkpointed in (False, True)]
    for parameter, gradient in frozen[0][0].items():
        assert torch.equal(gradient, frozen[1][0][parameter]), parameter
        if parameter.endswith("gate.weight"):
            assert not gradient.any()  # recorded weights are constants
    assert frozen[0][1] == frozen[1][1] == loss


def replay_nothing():
    return torch.enable_grad()


def test_gradients_under_ddp():
    model, x = MODELS["olmoe"](), tokens()
    with one_process():
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with capture(wrapped) as trace:
            wrapped(x, labels=x).loss.backward()
        expected = model.model.layers[0].mlp.gate.weight.grad.clone()
        model.zero_grad()
        with replay(wrapped, trace, weights="recomputed"):
            wrapped(x, labels=x).loss.backward()
    torch.testing.assert_close(model.model.layers[0].mlp.gate.weight.grad, expected)


def test_under_peft():
    from peft import LoraConfig, get_peft_model

    model = MODELS["olmoe"]()
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    check(get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options)), SITUATIONS["forward"])


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_weights_are_those_of_the_model_for_the_experts_of_the_trace(name):
    model, (x, mask) = MODELS[name](), left_padded()
    with capture(model) as trace, torch.no_grad():
        expected = model(x, attention_mask=mask).logits
    with replay(model, trace, weights="recomputed"), torch.no_grad():
        assert torch.equal(model(x, attention_mask=mask).logits, expected)
    break_gates(model)
    with replay(model, trace, weights="recomputed"), record(model) as states:
        model(x, attention_mask=mask)
    for layer, routing in states[0].tape.records:
        recorded, spec = trace.routing(layer), layer_selections(model)[layer].spec
        assert np.array_equal(routing.indices_TK.numpy(), recorded.indices_TK)
        for t in np.flatnonzero(recorded.indices_TK[:, 0] < 4):
            wanted = by_hand(routing.logits_TE[t].tolist(), recorded.indices_TK[t].tolist(), spec)
            assert routing.weights_TK[t].tolist() == pytest.approx(wanted, rel=1e-4), (layer, t)
            assert min(wanted) > 0


def by_hand(logits, experts, spec):
    """Weights of given experts, from the definition."""
    exps = [np.exp(v) for v in logits]
    scores = [v / (1 + v if spec.score == "sigmoid" else sum(exps)) for v in exps]
    chosen = [scores[e] for e in experts]
    divided = spec.renormalize == 1 or spec.order == "topk-score"
    return [spec.scale * v / (sum(chosen) if divided else 1) for v in chosen]


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_rollout_is_replayed_in_one_padded_pass(cache):
    model, (x, mask) = ours(), left_padded()
    with capture(model) as trace:
        made = model.generate(
            x, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=True, cache_implementation=cache
        )
    rows = [made[0, 3:-1], made[1, :-1]]
    right = torch.zeros(2, 12, dtype=torch.long)
    right_mask = torch.zeros_like(right)
    for b, row in enumerate(rows):
        right[b, : len(row)], right_mask[b, : len(row)] = row, 1
    break_gates(model)
    with replay(model, trace, by="position"), capture(model) as again, torch.no_grad():
        model(right, attention_mask=right_mask)
    assert same_decisions(trace, again, {0: 0, 1: 1})
    with replay(model, trace, by="position", sequences=[1]), capture(model) as one, torch.no_grad():
        model(right[1:], attention_mask=right_mask[1:])
    assert same_decisions(trace, one, {1: 0})


def same_decisions(trace, again, rows):
    """Whether sequences of one trace have the experts of those of the other, position by position."""
    found = [{}, {}]
    for decisions, seen in zip(found, (trace.final(), again.final()), strict=True):
        for s, p, layer, slot, expert in zip(
            seen.sequence, seen.position, seen.layer, seen.slot, seen.expert, strict=True
        ):
            decisions[int(s), int(p), int(layer), int(slot)] = int(expert)
    return found[1] == {
        (rows[s], p, layer, slot): expert for (s, p, layer, slot), expert in found[0].items() if s in rows
    }


def test_positions_that_the_trace_has_not_are_named():
    model, x = ours(), tokens(2, 6)
    with capture(model) as trace, torch.no_grad():
        model(x)
    with pytest.raises(ShapeError, match="position 6 of sequence 0"), replay(model, trace, by="position"):
        model(tokens(2, 7))
    with pytest.raises(ShapeError, match="2 sequences are replayed"), replay(model, trace, by="position"):
        model(tokens(3, 6))
    with pytest.raises(OptionError, match="got 7"), replay(model, trace, by="position", sequences=[7]):
        pass


def test_a_trace_that_does_not_fit_is_refused():
    model, x = ours(), tokens()
    with capture(model) as trace, torch.no_grad():
        model(x)
    with pytest.raises(OptionError, match="by layer"), replay(spread(native("mixtral")), trace):
        pass
    with pytest.raises(OptionError, match="1 calls, but the model makes another"), replay(model, trace):
        _ = model(x), model(x)
    with pytest.raises(ShapeError, match="18 tokens in 2 rows, but the model is given 18 in 1"), replay(model, trace):
        model(x.reshape(1, -1))
    with pytest.raises(ShapeError, match="no decision of layer 2"), replay(model, trace.of_layer("0")):
        model(x)
    with pytest.raises(OptionError, match="'call', 'position'"), replay(model, trace, by="token"):
        pass
    with pytest.raises(OptionError, match="by='position'"), replay(model, trace, sequences=[0]):
        pass
    with pytest.warns(MixturaWarning, match="1 calls are recorded, 0 were made"), replay(model, trace):
        pass


def test_an_error_inside_is_not_hidden_by_what_is_left():
    model = ours()
    with capture(model) as trace, torch.no_grad():
        model(tokens())
    with pytest.raises(ZeroDivisionError), replay(model, trace):
        1 / 0  # noqa: B018


def test_weights_of_routers_without_a_spec_are_not_recomputed():
    model = convert(pico("llama"), {1: Mixture(HashRouter(32, 4, 64), Experts(4, 32, 16))})
    with capture(model) as trace, torch.no_grad():
        expected = model(tokens()).logits
    with replay(model, trace), torch.no_grad():
        assert torch.equal(model(tokens()).logits, expected)
    with pytest.raises(NotExpressibleError, match=r"layer 1: .*HashRouter"), replay(model, trace, weights="recomputed"):
        pass
    phi = native("phimoe")
    with capture(phi) as trace, torch.no_grad():
        phi(tokens())
    with pytest.raises(NotExpressibleError, match="phimoe: sparsemixer"), replay(phi, trace, weights="recomputed"):
        pass


def test_k_may_differ_from_the_models():
    one, two = ours(k=2), ours(k=3)
    two.load_state_dict(one.state_dict())
    with capture(one) as trace, torch.no_grad():
        expected = one(tokens()).logits
    with replay(two, trace), torch.no_grad():
        assert torch.equal(two(tokens()).logits, expected)
