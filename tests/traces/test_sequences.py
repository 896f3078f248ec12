"""Which sequence a row continues: beams, drafts, chunks, caches that are shared, cut and made by the model."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from transformers import Cache, DynamicCache

from mixtura.hf.forward import past_length
from mixtura.traces import Trace
from mixtura.traces.capture import capture
from mixtura.traces.sequences import Sequences
from mixtura.traces.trace import DECODE, PREFILL, REJECTED
from pico import tokens
from pico_native import native
from traces.situations import assistant_of, left_padded, ours, spread

MODELS = {"ours": ours, "olmoe": lambda: spread(native("olmoe"))}
every_model = pytest.mark.parametrize("name", MODELS)


def first_slots(trace):
    return trace.select((trace.layer == 0) & (trace.slot == 0))


def text(trace, sequence):
    """Tokens of a sequence with what it took over, and that their positions count on."""
    rows = first_slots(trace.path(sequence))
    order = np.argsort(rows.position)
    assert rows.position[order].tolist() == list(range(len(rows)))
    return rows.token[order].tolist()


def alone(model, ids):
    """Trace of one pass over a text."""
    with capture(model) as trace, torch.no_grad():
        model(torch.tensor([ids]))
    return trace


def decisions(trace, length):
    """Experts by layer, position and slot of the first positions."""
    rows = trace.select(trace.position < length)
    return {
        (int(layer), int(p), int(slot)): int(e)
        for layer, p, slot, e in zip(rows.layer, rows.position, rows.slot, rows.expert, strict=True)
    }


@every_model
def test_every_beam_that_is_returned_is_the_path_of_a_sequence(name):
    model, (x, mask) = MODELS[name](), left_padded()
    with capture(model) as trace:
        made = model.generate(
            x,
            attention_mask=mask,
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
        )
    assert len(trace.parents) > 4
    texts = {int(s): text(trace, int(s)) for s in np.unique(trace.sequence)}
    for row, returned in enumerate(made[:, :-1].tolist()):
        wanted = returned[3:] if row < 4 else returned
        (first, *_) = [s for s, found in texts.items() if found[: len(wanted)] == wanted]
        assert decisions(trace.path(first), len(wanted)) == decisions(alone(model, wanted), len(wanted))


def test_a_beam_that_nobody_shares_stays_what_it_is():
    model, x, cache = MODELS["olmoe"](), tokens(3, 5), DynamicCache()
    with capture(model) as trace, torch.no_grad():
        model(x, past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        model(x[:, :1], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        model(x[:2, :1], past_key_values=cache)
    rows = first_slots(trace)
    by_call = [rows.select(rows.call == c) for c in range(3)]
    assert by_call[1].sequence.tolist() == [2, 0, 1]
    assert by_call[2].sequence.tolist() == [0, 3]
    assert by_call[2].position.tolist() == [6, 6]
    assert trace.parents == {3: (0, 6)}
    assert text(trace, 3) == [*x[0].tolist(), int(x[1, 0]), int(x[1, 0])]


@every_model
@pytest.mark.parametrize("draft", ["assistant", "lookup"])
def test_rejected_drafts_have_a_phase_and_do_not_count(name, draft):
    model, x = MODELS[name](), tokens(1, 7)
    help_ = {"assistant_model": assistant_of(model)} if draft == "assistant" else {"prompt_lookup_num_tokens": 3}
    with capture(model) as trace:
        made = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=12, min_new_tokens=12, **help_)
    rows = first_slots(trace)
    assert (rows.phase == REJECTED).any()
    assert set(rows.sequence.tolist()) == {0}
    counted = rows.counted()
    assert sorted(counted.position.tolist()) == list(range(18))
    assert text(trace, 0) == made[0, :-1].tolist()
    later = counted.select(counted.call > 0)
    assert set(later.phase.tolist()) == {DECODE}
    assert decisions(trace.final(), 18) == decisions(alone(model, made[0, :-1].tolist()), 18)


@every_model
def test_chunks_of_a_prompt_are_one_sequence(name):
    model, (x, mask) = MODELS[name](), left_padded(length=8)
    options = {"attention_mask": mask, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    traces = []
    for chunk in (None, 3):
        with capture(model) as trace:
            model.generate(x, prefill_chunk_size=chunk, **options)
        traces.append(trace.select(np.lexsort((trace.slot, trace.position, trace.sequence, trace.layer))))
    whole, chunked = (trace.select(trace.valid) for trace in traces)
    for column in ("sequence", "position", "token", "phase", "layer", "slot", "expert"):
        assert np.array_equal(getattr(whole, column), getattr(chunked, column)), column
    assert int(traces[1].call.max()) == int(traces[0].call.max()) + 2


def test_a_prompt_whose_cache_is_cut_back_has_several_continuations():
    model, x, cache = MODELS["olmoe"](), tokens(1, 9), DynamicCache()
    with capture(model) as trace, torch.no_grad():
        model(x[:, :5], past_key_values=cache)
        model(x[:, 5:8], past_key_values=cache)
        cache.crop(-3)
        model(x[:, 8:], past_key_values=cache)
    rows = first_slots(trace)
    assert rows.sequence.tolist() == [0] * 8 + [1]
    assert rows.phase.tolist() == [PREFILL] * 8 + [DECODE]
    assert trace.parents == {1: (0, 5)}
    assert text(trace, 0) == x[0, :8].tolist()
    assert text(trace, 1) == [*x[0, :5].tolist(), int(x[0, 8])]


def test_two_caches_side_by_side_are_not_mixed_up():
    model, x, caches = MODELS["olmoe"](), tokens(2, 6), (DynamicCache(), DynamicCache())
    with capture(model) as trace, torch.no_grad():
        for length in (4, 1, 1):
            for b, cache in enumerate(caches):
                begin = cache.get_seq_length()
                model(x[b : b + 1, begin : begin + length], past_key_values=cache)
    assert [text(trace, b) for b in range(2)] == x.tolist()


def test_a_copied_cache_and_one_that_was_there_before_begin_sequences_at_their_positions():
    model, x, cache = MODELS["olmoe"](), tokens(1, 6), DynamicCache()
    with torch.no_grad():
        model(x[:, :3], past_key_values=cache)
        with capture(model) as trace:
            model(x[:, 3:4], past_key_values=cache)
            model(x[:, 4:5], past_key_values=copy.deepcopy(cache))
    rows = first_slots(trace)
    assert rows.position.tolist() == [3, 4]
    assert rows.sequence.tolist() == [0, 1]


def test_a_cache_that_the_model_makes_is_followed():
    model, x = MODELS["olmoe"](), tokens(2, 6)
    with capture(model) as trace, torch.no_grad():
        out = model(x[:, :4], use_cache=True)
        for place in (4, 5):
            out = model(x[:, place : place + 1], past_key_values=out.past_key_values)
    assert [text(trace, b) for b in range(2)] == x.tolist()


def test_a_cache_that_begins_again_begins_new_sequences():
    model, x, cache = MODELS["olmoe"](), tokens(1, 4), DynamicCache()
    with capture(model) as trace, torch.no_grad():
        model(x, past_key_values=cache)
        cache.reset()
        model(x, past_key_values=cache)
    assert first_slots(trace).sequence.tolist() == [0] * 4 + [1] * 4
    assert trace.parents == {}


def test_caches_are_left_as_they_were():
    before = dict(vars(Cache))
    with contextlib.suppress(ZeroDivisionError), capture(MODELS["olmoe"]()):
        inside = dict(vars(Cache))
        1 / 0  # noqa: B018
    assert dict(vars(Cache)) == before
    assert {name for name in before if inside[name] is not before[name]} == {
        "reorder_cache", "crop", "batch_select_indices", "batch_repeat_interleave",
    }  # fmt: skip


class Linear:
    """A cache of linear attention alone."""

    def get_seq_length(self):
        raise ValueError("no attention layers")


def test_the_past_of_linear_attention_is_told_by_mask_or_positions():
    ids, cache = torch.zeros(2, 3, dtype=torch.long), Linear()
    assert past_length({"input_ids": ids, "past_key_values": cache, "attention_mask": torch.ones(2, 8)}) == 5
    positions = torch.tensor([[4, 5, 6], [2, 3, 4]])
    assert past_length({"input_ids": ids, "past_key_values": cache, "position_ids": positions}) == 4
    assert past_length({"input_ids": ids, "past_key_values": cache}) == 0
    assert past_length({"input_ids": ids}) == 0


def test_rows_of_linear_attention_are_followed_by_the_mask():
    sequences, cache, ids = Sequences(set(), -1), Linear(), torch.zeros(2, 3, dtype=torch.long)
    found = []
    for begin, end in ((0, 3), (3, 4), (4, 5)):
        mask = torch.ones(2, end, dtype=torch.long)
        mask[0, 0] = 0
        kwargs = {"input_ids": ids[:, : end - begin], "past_key_values": cache, "attention_mask": mask}
        found.append(sequences.open((), kwargs))
        sequences.cropped(cache)
    assert [call.sequence_B.tolist() for call in found] == [[0, 1]] * 3
    assert [call.position_BQ.tolist() for call in found] == [[[-1, 0, 1], [0, 1, 2]], [[2], [3]], [[3], [4]]]


def test_parents_are_saved_and_counted_on_when_traces_are_joined(tmp_path):
    model, x = MODELS["olmoe"](), tokens(1, 5)
    with capture(model) as trace:
        model.generate(x, attention_mask=torch.ones_like(x), num_beams=3, max_new_tokens=4, do_sample=False)
    loaded = Trace.load(trace.save(tmp_path / "t.safetensors"))
    assert loaded.parents == trace.parents != {}
    joined, first = Trace.concat([trace, loaded]), int(trace.sequence.max()) + 1
    for sequence in np.unique(trace.sequence).tolist():
        assert text(joined, sequence) == text(joined, sequence + first) == text(trace, sequence)
