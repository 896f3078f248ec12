"""Steering does what is asked for and nothing else: laws of identity to the bit, and oracles for what changes."""

import contextlib
import copy
import types

import numpy as np
import pytest
import torch

from mixtura.core import NotExpressibleError, OptionError, UnknownNameError
from mixtura.core import routing as r
from mixtura.core.selection import SelectionSpec, select
from mixtura.hf import convert, record
from mixtura.hf.selection import layer_selections
from mixtura.nn import Experts, Mixture
from mixtura.nn.routers.dynamic_top_p import DynamicTopPRouter
from mixtura.nn.routers.expert_choice import ExpertChoiceRouter
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.steering import steer
from mixtura.traces.capture import capture
from mixtura.traces.replay import replay
from pico import pico, tokens
from pico_native import FAMILIES, native
from traces.situations import MODELS, SITUATIONS, assistant_of, break_gates, left_padded, ours, spread

REFUSED = {"axk2", "deepseek_v4", "gemma4_text", "inkling_text", "kolibri1", "laguna", "phimoe", "zaya"}
NO_FORWARD = {
    "bailing_hybrid",
    "kimi_linear",
}  # of linear attention alone at this size: transformers needs use_cache=False
every_model = pytest.mark.parametrize("name", MODELS)


def logits(model):
    x, mask = left_padded()
    with torch.no_grad():
        return model(x, attention_mask=mask, use_cache=False).logits


def tape(model):
    """Routing of each layer on left-padded text, and which tokens are real."""
    x, mask = left_padded()
    with record(model) as states, torch.no_grad():
        model(x, attention_mask=mask, use_cache=False)
    return dict(states[0].tape.records), mask.reshape(-1).bool()


def choices(routing):
    return [{e for e in row if e < routing.num_experts} for row in routing.indices_TK.tolist()]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_selecting_again_changes_no_bit(family):
    model = spread(native(family))
    expected = logits(model)
    with steer(model):
        assert torch.equal(logits(model), expected)
    if family in REFUSED:
        with pytest.raises(NotExpressibleError, match=family), steer(model, bias={0: 0.0}):
            pass
        return
    with steer(model, bias={0: 0.0}):  # selects again, and finds the same
        assert torch.equal(logits(model), expected)
    with steer(model, k=2):
        assert torch.equal(logits(model), expected)
    with steer(model, k=1):
        assert not torch.equal(logits(model), expected)


@every_model
def test_ours_select_again_without_changing_a_bit(name):
    model = MODELS[name]()
    expected = logits(model)
    for nothing in ({}, {"bias": {1: 0.0}}, {"k": 2}, {"ranks": [0, 1]}):
        with steer(model, **nothing):
            assert torch.equal(logits(model), expected), nothing


@pytest.mark.parametrize("name", ["ours", "mixtral", "deepseek_v3", "gpt_oss"])
def test_off_of_who_is_never_chosen_and_force_of_who_always_is_change_no_bit(name):
    model = MODELS[name]()
    with steer(model, bias={3: -100.0}):
        without = logits(model)
        with steer(model, off=[3]):
            assert torch.equal(logits(model), without)
    with steer(model, bias={3: 100.0}):
        always = logits(model)
        with steer(model, force=[3]):
            assert torch.equal(logits(model), always)
    assert not torch.equal(without, always)


@every_model
def test_off_and_force(name):
    model = MODELS[name]()
    with steer(model, off=[2]):
        routings, real_T = tape(model)
    for routing in routings.values():
        r.check(routing)
        chosen = [found for found, real in zip(choices(routing), real_T, strict=True) if real]
        assert all(2 not in found for found in chosen)
    with steer(model, force=[1]):
        routings, real_T = tape(model)
    for routing in routings.values():
        r.check(routing)
        chosen = [found for found, real in zip(choices(routing), real_T, strict=True) if real]
        assert all(1 in found and len(found) == 2 for found in chosen)
        weights_T = r.dense(routing)[:, 1][real_T]
        assert (weights_T > 0).all()


@pytest.mark.parametrize("name", ["ours", "olmoe", "qwen2_moe", "gpt_oss"])
def test_choices_equal_a_loop(name):
    model = MODELS[name]()
    free, real_T = tape(model)
    cases = {
        "k": ({"k": 3}, lambda order: order[:3]),
        "ranks": ({"ranks": [3, 1]}, lambda order: [order[3], order[1]]),
        "off": ({"off": [0]}, lambda order: [e for e in order if e != 0][:2]),
        "off ranks": ({"off": [0], "ranks": [1]}, lambda order: [[e for e in order if e != 0][1]]),
        "force": ({"force": [2]}, lambda order: sorted({2, next(e for e in order if e != 2)}, key=order.index)),
    }
    first = next(iter(free))
    spec = layer_selections(model)[first].spec
    for case, (options, wanted) in cases.items():
        with steer(model, layers=[first], **options):
            routing = tape(model)[0][first]
        for t in torch.nonzero(real_T).flatten().tolist():
            row = free[first].logits_TE[t].tolist()
            order = sorted(range(4), key=lambda e: -row[e])
            assert routing.indices_TK[t].tolist() == wanted(order), case
            assert routing.weights_TK[t].tolist() == pytest.approx(weights(row, wanted(order), spec), rel=1e-4), case
        if name == "ours":
            assert (routing.indices_TK[~real_T] == 4).all()


def weights(logits_E, experts, spec):
    exps = [np.exp(v) for v in logits_E]
    chosen = [exps[e] / sum(exps) for e in experts]
    divided = spec.renormalize == 1 or spec.order == "topk-score"
    return [v / (sum(chosen) if divided else 1) for v in chosen]


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_a_bias_chooses_and_never_weighs(name):
    model = MODELS[name]()
    with steer(model, bias={0: 50.0, 2: 60.0}):
        routings, _ = tape(model)
    selections = layer_selections(model)
    for layer, routing in routings.items():
        found = choices(routing)
        if name == "deepseek_v3":  # its groups are chosen with the bias too, and the two are in different ones
            assert all(2 in row for row in found)
        else:
            assert found == [{0, 2}] * len(found)
        scores_TE = routing.logits_TE.sigmoid() if name == "deepseek_v3" else routing.logits_TE.softmax(-1)
        chosen_TK = scores_TE.gather(1, routing.indices_TK)
        spec = selections[layer].spec
        divided = chosen_TK / chosen_TK.sum(-1, keepdim=True) if name != "olmoe" else chosen_TK
        torch.testing.assert_close(routing.weights_TK, divided * spec.scale, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", ["ours", "olmoe"])
def test_k_of_one_is_the_model_with_k_of_one_in_every_situation(name, situation):
    model, other = MODELS[name](), MODELS[name]()
    for module in other.modules():
        if hasattr(module, "top_k"):
            module.top_k = 1
        if isinstance(module, TopKRouter):
            module.spec = SelectionSpec(k=1, renormalize=1)
    with steer(model, k=1), steer(assistant_of(model), k=1):
        steered = SITUATIONS[situation](model)
    assert torch.equal(steered, SITUATIONS[situation](other))


@pytest.mark.parametrize("name", ["ours", "mixtral"])
def test_recomputation_is_steered_too(name):
    model, x, found = MODELS[name]().train(), tokens(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        with steer(model, off=[0]):
            losses = [model(y, labels=x, use_cache=False).loss for y in (x, x.flip(0))]
            sum(losses).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for parameter, gradient in found[0].items():
        assert torch.equal(gradient, found[1][parameter]), parameter
    gate = "model.layers.0.mlp.mixture.router.gate.weight" if name == "ours" else "model.layers.0.mlp.gate.weight"
    assert found[0][gate].any()


def test_under_peft_and_nothing_is_left_behind():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(MODELS["olmoe"](), LoraConfig(r=2, target_parameters=["experts.gate_up_proj"]))
    expected = logits(model)
    with contextlib.suppress(ZeroDivisionError), steer(model, off=[1]):
        changed = logits(model)
        1 / 0  # noqa: B018
    assert not torch.equal(changed, expected)
    assert torch.equal(logits(model), expected)


def test_nesting_joins_what_is_asked_for():
    model = MODELS["mixtral"]()
    with steer(model, off=[0]), steer(model, k=1, layers=[0]), steer(model, off=[1], layers=["0"]):
        routings, _ = tape(model)
        with steer(model, k=2):
            inner, _ = tape(model)
    assert {frozenset(row) for row in choices(routings["0"])} <= {frozenset({2}), frozenset({3})}
    assert all(0 not in row and len(row) == 2 for row in choices(routings["1"]))
    assert choices(inner["0"]) == [{2, 3}] * 14
    with steer(model, bias={0: 30.0}), steer(model, bias={0: -60.0}):
        assert all(0 not in row for row in choices(tape(model)[0]["0"]))
    both = pytest.raises(OptionError, match="layer 0: expert 1 cannot be in off and in force")
    with both, steer(model, off=[1]), steer(model, force=[1]):
        pass
    assert torch.equal(logits(model), logits(MODELS["mixtral"]()))


def test_what_is_entered_last_decides_between_replay_and_steer():
    model = MODELS["olmoe"]()
    with capture(model) as trace:
        expected = logits(model)
    with steer(model, k=1):
        one = logits(model)
        with replay(model, trace):
            assert torch.equal(logits(model), expected)
    with replay(model, trace), steer(model, k=1):
        assert torch.equal(logits(model), one)


def test_groups_are_chosen_as_ever():
    """Two groups of two experts, one of which is kept: without one of its experts a slot stays empty."""
    model = MODELS["deepseek_v3"]()
    free, _ = tape(model)
    with steer(model, off=[0], layers=["0"]):
        routing = tape(model)[0]["0"]
    for before, after in zip(choices(free["0"]), choices(routing), strict=True):
        assert after == before - {0}
    assert (r.dense(routing).sum(-1) - 2.5).abs().max() < 1e-4  # normalized over who is left, then scaled
    with steer(model, force=[0], layers=["0"]):
        forced = tape(model)[0]["0"]
    assert all(0 in row and len(row) == 2 for row in choices(forced))
    assert (r.dense(forced)[:, 0] > 0).all()


def test_probability_stops_as_ever_and_padding_of_ours_stays_unrouted():
    mixtures = {1: Mixture(DynamicTopPRouter(32, 4, p=0.5), Experts(4, 32, 16))}
    model = spread(convert(pico("llama"), mixtures))
    expected = logits(model)
    with steer(model, bias={0: 0.0}):
        assert torch.equal(logits(model), expected)
    free, real_T = tape(model)
    with steer(model, off=[1]):
        routing = tape(model)[0]["1"]
    for t, (before, after) in enumerate(zip(choices(free["1"]), choices(routing), strict=True)):
        assert 1 not in after
        assert bool(after) == bool(real_T[t])
        assert before == after or 1 in before
    with pytest.raises(NotExpressibleError, match="layer 1: force needs a router that fills"), steer(model, force=[1]):
        pass


def test_layers_that_cannot_select_again():
    """Off is taken out of what they decided if it is known how weights are normalized; else they are refused."""
    mixtures = {1: Mixture(ExpertChoiceRouter(32, 4), Experts(4, 32, 16))}
    model = spread(convert(pico("llama"), mixtures, allow=["expert-choice"]))
    for options in ({"k": 1}, {"ranks": [1]}, {"bias": {0: 1.0}}, {"force": [0]}, {"off": [0]}):
        with pytest.raises(NotExpressibleError, match=r"layer 1: .*ExpertChoiceRouter"), steer(model, **options):
            pass
    for renormalize in (None, 1.0):
        model = ours(layers=(1,))
        (mixture,) = [module for module in model.modules() if isinstance(module, Mixture)]
        router = mixture.router
        router.spec = SelectionSpec(k=2, renormalize=renormalize)
        mixture.router = _Odd(router)
        free, _ = tape(model)
        with steer(model, off=[0]):
            routing = tape(model)[0]["1"]
        for t, row in enumerate(free["1"].indices_TK.tolist()):
            kept = [(e, w) for e, w in zip(row, free["1"].weights_TK[t].tolist(), strict=True) if e not in (0, 4)]
            total = sum(w for _, w in kept)
            expected = {e: w / total if renormalize and 0 in row else w for e, w in kept}
            assert choices(routing)[t] == set(expected)
            for e, w in expected.items():
                assert float(r.dense(routing)[t, e]) == pytest.approx(w, rel=1e-5)
        with pytest.raises(NotExpressibleError, match="layer 1: k selects again"), steer(model, k=1):
            pass


class _Odd(TopKRouter):
    """A router that says its spec, but not that it follows it."""

    def __init__(self, router):
        super().__init__(32, 4, 2)
        self.gate, self.spec = router.gate, router.spec

    def forward(self, hidden_TD):
        return super().forward(hidden_TD)


def test_a_native_router_that_does_not_follow_its_spec_is_found_out():
    model = MODELS["mixtral"]()
    model.model.layers[1].mlp.gate.forward = types.MethodType(_least, model.model.layers[1].mlp.gate)
    with pytest.raises(NotExpressibleError, match="layer 1: its router decides otherwise"), steer(model, k=1):
        logits(model)
    del model.model.layers[1].mlp.gate.forward
    model.model.layers[1].mlp.gate.forward = types.MethodType(_silent, model.model.layers[1].mlp.gate)
    with pytest.raises(NotExpressibleError, match="layer 1: its router gives no logits"), steer(model, k=1):
        logits(model)


def _least(self, hidden):
    logits_TE = torch.nn.functional.linear(hidden.reshape(-1, 32), self.weight)
    return (logits_TE, *select(-logits_TE, SelectionSpec(k=2, renormalize=1))[1:])


def _silent(self, hidden):
    return (None, *_least(self, hidden)[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"layer 0: k must lie in 1 \.\. 4, .* E = 4 .*, got 0"),
        ({"k": 5}, r"layer 0: k must lie in 1 \.\. 4, .* got 5"),
        ({"k": 3, "off": [0, 1]}, r"k must lie in 1 \.\. 2"),
        ({"off": range(4)}, "layer 0: off must leave one of the E = 4 experts"),
        ({"off": [4]}, r"layer 0: off must be of the experts 0 \.\. 3, got 4"),
        ({"force": [-1]}, r"force must be of the experts 0 \.\. 3, got -1"),
        ({"bias": {7: 1.0}}, r"bias must be of the experts 0 \.\. 3, got 7"),
        ({"force": [0, 1, 2]}, r"force must name at most k = 2 experts, got 3 of E = 4"),
        ({"off": [1], "force": [1]}, "expert 1 cannot be in off and in force"),
        ({"ranks": [4]}, r"ranks must be different ones of 0 \.\. 3 \(E = 4\), got \[4\]"),
        ({"ranks": [1, 1]}, "ranks must be different"),
        ({"ranks": []}, "ranks must be different"),
        ({"ranks": [0], "k": 1}, "ranks cannot go with k"),
        ({"ranks": [0], "force": [1]}, "ranks cannot go with force"),
    ],
)
@pytest.mark.parametrize("name", ["ours", "mixtral"])
def test_what_a_layer_has_not_is_refused_by_name(name, options, message):
    model = MODELS[name]()
    with pytest.raises(OptionError, match=message), steer(model, **options):
        pass
    with steer(model, off=[0]):  # what was refused is not remembered
        tape(model)


def test_more_than_the_groups_kept_hold():
    model = MODELS["deepseek_v3"]()
    with pytest.raises(OptionError, match="layer 0: k must be at most the 2 experts"), steer(model, k=3):
        pass


def test_unknown_layers_and_models_without_mixtures():
    with pytest.raises(UnknownNameError, match="layer '7'"), steer(MODELS["mixtral"](), k=1, layers=[7]):
        pass
    with pytest.raises(NotExpressibleError, match="no mixture that could be steered"), steer(pico("llama"), k=1):
        pass


def test_gradient_reaches_the_gate_through_a_changed_decision():
    model, x = MODELS["olmoe"](), tokens()
    with steer(model, ranks=[2, 3]):
        model(x, labels=x).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.any()


def test_copies_are_steered_by_themselves():
    model = MODELS["olmoe"]()
    expected, other = logits(model), copy.deepcopy(model)
    with steer(model, k=1):
        assert torch.equal(logits(other), expected)
        assert not torch.equal(logits(model), expected)


def test_other_gates_and_half_precision():
    """Families that score in float32 select again to the bit in bfloat16 too."""
    for name in ("mixtral", "deepseek_v3"):
        model = MODELS[name]().to(torch.bfloat16)
        break_gates(model)
        expected = logits(model)
        with steer(model, bias={0: 0.0}):
            assert torch.equal(logits(model), expected), name
