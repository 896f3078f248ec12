"""Capture sees what the routers decide: on native models and ours, padded, generating, training, checkpointed."""

import contextlib

import numpy as np
import pytest
import torch

from mixtura.core import MixturaWarning, NotExpressibleError, OptionError
from mixtura.hf import convert, record
from mixtura.nn import Experts, Mixture
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.traces.capture import capture
from mixtura.traces.trace import DECODE, PREFILL
from pico import pico, tokens

NATIVE = {
    "mixtral": {},
    "olmoe": {},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def native(family, **options):
    return pico(family, **{**NATIVE[family], **options})


def ours(base="llama", layers=(0, 2)):
    return convert(pico(base), {i: Mixture(TopKRouter(32, 4, 2), Experts(4, 32, 16)) for i in layers})


def left_padded():
    x, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    return x.masked_fill(mask == 0, 0), mask


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


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("make", [lambda: native("mixtral"), lambda: native("olmoe"), ours])
def test_generation_continues_positions(make, cache):
    model, (x, mask) = make(), left_padded()
    with capture(model, domain=["a", "b"]) as trace:
        made = model.generate(x, attention_mask=mask, max_new_tokens=4, do_sample=False, cache_implementation=cache)
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
