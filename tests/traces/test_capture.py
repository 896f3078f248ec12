"""Capture sees what the routers decide: on native models and ours, padded, generating, training, checkpointed."""

import contextlib

import numpy as np
import pytest
import torch

import pico_native
from mixtura.core import MixturaWarning, NotExpressibleError, OptionError
from mixtura.hf import record
from mixtura.traces import Trace
from mixtura.traces.capture import capture
from mixtura.traces.trace import DECODE, PREFILL
from pico import pico, tokens
from traces.situations import left_padded, one_process, ours, spread

NATIVE = {
    "mixtral": {},
    "olmoe": {},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def native(family, **options):
    return pico(family, **{**NATIVE[family], **options})


def watch_gates(model):
    """What the routers return, by layer and call."""
    seen = [[] for _ in model.model.layers]
    for i, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda _, args, out, i=i: seen[i].append(out))
    return seen


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", NATIVE)
def test_native_decisions_equal_the_routers_own(family, backend):
    model = native(family)
    model.set_experts_implementation(backend)
    seen, (x, mask) = watch_gates(model), left_padded()
    with capture(model, domain="man-de") as trace, torch.no_grad():
        model(x, attention_mask=mask)
    assert (trace.layers, trace.meta["experts"], trace.domains) == (["0", "1", "2"], [4, 4, 4], ["man-de"])
    assert len(trace) == 3 * 14 * 2
    for i in range(3):
        routing = trace.routing(str(i))
        _, weights, indices = seen[i][0]
        assert np.array_equal(routing.indices_TK, indices.numpy())
        assert np.array_equal(routing.weights_TK, weights.detach().float().numpy())


def test_padding_has_no_position_and_does_not_count():
    x, mask = left_padded()
    model = native("mixtral")
    with capture(model) as trace:
        model(x, attention_mask=mask)
    first = trace.select((trace.layer == 0) & (trace.slot == 0))
    assert first.position.tolist() == [-1, -1, -1, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]
    assert first.token.tolist() == x.reshape(-1).tolist()
    assert first.valid.tolist() == mask.bool().reshape(-1).tolist()
    assert first.sequence.tolist() == first.row.tolist() == [0] * 7 + [1] * 7
    assert len(trace.counted()) == 11 * 3 * 2
    assert set(trace.domain.tolist()) == {-1}


WINDOWS = {"mixtral window": {"sliding_window": 4}, "gpt_oss window": {"sliding_window": 4}}


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "ours", *WINDOWS])
def test_generation_continues_positions(name, cache):
    """Also where a layer's cache holds less than the text."""
    family = name.removesuffix(" window")
    model = ours() if name == "ours" else spread(pico_native.native(family, **WINDOWS.get(name, {})))
    x, mask = left_padded()
    with capture(model, domain=["a", "b"]) as trace:
        made = model.generate(
            x, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation=cache
        )
    rows = trace.select((trace.layer == 0) & (trace.slot == 0) & trace.valid)
    for row, padded in ((0, 3), (1, 0)):
        mine = rows.select(rows.sequence == row)
        wanted = made[row, padded:-1]
        assert mine.position.tolist() == list(range(len(wanted)))
        assert mine.token.tolist() == wanted.tolist()
        assert mine.phase.tolist() == [PREFILL] * (7 - padded) + [DECODE] * 3
        assert set(mine.domain.tolist()) == {row}
    assert trace.call.max() == 3


@pytest.mark.parametrize("cache", [None, "static"])
def test_decoded_tokens_route_as_in_one_pass(cache):
    model, x = native("olmoe"), tokens(2, 7)
    with capture(model) as stepwise:
        made = model.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=4, do_sample=False, cache_implementation=cache
        )
    with capture(model) as whole, torch.no_grad():
        model(made[:, :-1])
    one, other = (ordered(trace) for trace in (stepwise, whole))
    for name in ("position", "token", "valid", "layer", "slot", "expert", "sequence"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    np.testing.assert_allclose(one.weight, other.weight, atol=1e-5)


def ordered(trace):
    return trace.select(np.lexsort((trace.slot, trace.position, trace.sequence, trace.layer)))


def test_filler_behind_the_end_of_a_row_is_no_token():
    model, x = native("olmoe"), tokens(2, 5)
    free = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False)
    end = int(free[0, 5])
    assert end not in free[1, 5:].tolist()
    model.generation_config.eos_token_id = end
    with capture(model) as trace:
        model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False)
    rows = trace.select((trace.layer == 0) & (trace.slot == 0) & (trace.phase == DECODE))
    assert rows.select(rows.sequence == 0).valid.tolist() == [True, False, False, False]
    assert rows.select(rows.sequence == 1).valid.tolist() == [True] * 4


def test_calls_without_a_past_begin_new_sequences():
    model, x = native("mixtral"), tokens()
    with capture(model) as trace:
        model(x)
        model(x[:1])
    pairs = sorted({(int(c), int(s)) for c, s in zip(trace.call, trace.sequence, strict=True)})
    assert pairs == [(0, 0), (0, 1), (1, 2)]


def test_ours_equal_the_tape():
    model, (x, mask) = ours(), left_padded()
    with record(model) as states, capture(model) as trace:
        model(x, attention_mask=mask)
    assert trace.layers == ["0", "2"]
    for layer, routing in states[0].tape.records:
        captured = trace.routing(layer)
        assert np.array_equal(captured.indices_TK, routing.indices_TK.numpy())
        assert np.array_equal(captured.weights_TK, routing.weights_TK.detach().numpy())
    padding = trace.select(~trace.valid)
    assert (padding.expert == 4).all()
    assert (padding.weight == 0).all()


def test_ours_and_native_layers_side_by_side():
    model = ours("olmoe", layers=(1,))
    with capture(model) as trace:
        model(tokens())
    assert trace.layers == ["0", "1", "2"]
    assert np.bincount(trace.layer).tolist() == [36, 36, 36]


@pytest.mark.parametrize("make", [lambda: native("mixtral"), ours])
def test_recomputation_is_not_recorded_again(make):
    x, traces = tokens(), []
    for checkpointed in (False, True):
        model = make().train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with capture(model) as trace:
            one, two = (model(y, labels=x, use_cache=False) for y in (x, x.flip(0)))
            (one.loss + two.loss).backward()
        traces.append(trace)
    for name, column in traces[0].columns.items():
        assert np.array_equal(column, traces[1].columns[name]), name


def test_under_peft_with_positional_arguments():
    from peft import LoraConfig, get_peft_model

    model = native("olmoe")
    with capture(model) as plain:
        model(tokens())
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    )
    with capture(adapted) as trace:
        adapted.base_model.model.model(tokens())
    for name, column in plain.columns.items():
        assert np.array_equal(column, trace.columns[name]), name


def test_decisions_are_kept_when_the_block_fails():
    model = native("mixtral")
    with contextlib.suppress(ZeroDivisionError), capture(model) as trace:
        model(tokens())
        1 / 0  # noqa: B018
    filled = len(trace)
    assert filled == 3 * 18 * 2
    model(tokens())
    assert len(trace) == filled


def test_what_cannot_be_seen_is_said():
    with pytest.raises(NotExpressibleError, match="no mixture"), capture(pico("llama")):
        pass
    with pytest.warns(MixturaWarning, match="no forward call"), capture(native("mixtral")):
        pass
    with pytest.raises(OptionError, match="each of the 2 rows, got 3"), capture(model := ours(), domain=["a"] * 3):
        model(tokens())


def test_embeddings_without_tokens():
    model, x = native("mixtral"), tokens()
    with capture(model) as trace:
        model(inputs_embeds=model.get_input_embeddings()(x).detach())
    assert set(trace.token.tolist()) == {-1}
    assert trace.valid.all()


def test_beams_share_the_domain_of_their_row():
    model, x = native("mixtral"), tokens(2, 5)
    with capture(model, domain=["a", "b"]) as trace:
        model.generate(x, attention_mask=torch.ones_like(x), num_beams=3, max_new_tokens=2, do_sample=False)
    assert sorted({(int(r), int(d)) for r, d in zip(trace.row, trace.domain, strict=True)}) == [
        (0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "phimoe", "ours"])
def test_logits_on_demand(family, tmp_path):
    model = ours() if family == "ours" else spread(pico_native.native(family))
    x, mask = left_padded()
    with record(model) as states, capture(model, logits=True) as trace, torch.no_grad():
        model(x, attention_mask=mask)
        model(x[:, 3:])
    loaded = Trace.load(trace.save(tmp_path / "t.safetensors"))
    for layer in trace.layers:
        recorded = [record.routing for state in states for record in state.tape.records if record.layer == layer]
        wanted = torch.cat([routing.logits_TE for routing in recorded]).numpy()
        assert np.isfinite(wanted).all()
        for seen in (trace, loaded):
            assert np.array_equal(seen.logits[layer], wanted)
            assert np.array_equal(seen.routing(layer).logits_TE, wanted)
        counted = trace.counted().routing(layer)
        assert np.array_equal(counted.logits_TE, wanted[np.append(mask.reshape(-1).bool(), np.ones(8, bool))])
    with capture(model) as without, torch.no_grad():
        model(x, attention_mask=mask)
    assert without.logits == {}
    assert np.isnan(without.routing(layer).logits_TE).all()


def test_a_router_without_logits_has_unknown_ones():
    model = native("mixtral")
    gate = model.model.layers[0].mlp.gate
    theirs = gate.forward
    gate.forward = lambda hidden: (None, *theirs(hidden)[1:])
    with capture(model, logits=True) as trace, torch.no_grad():
        model(tokens())
    assert np.isnan(trace.logits["0"]).all()
    assert trace.logits["0"].shape == (18, 4)
    assert np.isfinite(trace.logits["1"]).all()


def test_a_reference_model_and_calls_without_gradient_are_recorded_as_they_come():
    """What preference training does: the policy, and a reference beside it; each has a trace of its own."""
    policy, reference, x = native("olmoe").train(), native("olmoe"), tokens()
    with capture(policy) as seen, capture(reference) as other:
        with torch.no_grad():
            reference(x)
        loss = policy(x, labels=x).loss
        with torch.inference_mode():
            policy(x[:1])
        loss.backward()
    assert (int(seen.call.max()), int(other.call.max())) == (1, 0)
    assert np.array_equal(seen.select(seen.call == 0).expert, other.expert)


def test_under_ddp():
    model = native("olmoe")
    with capture(model) as plain, torch.no_grad():
        model(tokens())
    with one_process():
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with capture(wrapped) as trace:
            wrapped(tokens(), labels=tokens()).loss.backward()
    for name, column in plain.columns.items():
        assert np.array_equal(column, trace.columns[name]), name


def test_captures_nest():
    model = native("mixtral")
    with capture(model) as outer, torch.no_grad():
        model(tokens())
        with capture(model) as inner:
            model(tokens())
        model(tokens())
    assert (int(outer.call.max()), int(inner.call.max())) == (2, 0)


def test_calls_that_reach_no_mixture_are_said():
    model = native("mixtral")
    for layer in model.model.layers:
        layer.mlp.forward = lambda hidden: hidden
    with pytest.warns(MixturaWarning, match="reached none of its mixtures"), capture(model):
        model(tokens())


@pytest.mark.parametrize("family", sorted(pico_native.OUTSIDE))
def test_families_whose_experts_cannot_be_seen_are_named(family):
    model = pico_native.native(family)
    with pytest.raises(NotExpressibleError, match=f"{family} computes its experts"), capture(model):
        pass
