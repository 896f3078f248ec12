"""Sliding windows: plans and caches that hold no more than a window reaches."""

import pytest
import torch
from transformers import DynamicCache

import mixtura
from hf.decoders import WIDE, WINDOWED, decoded, generated, left, report
from mixtura.hf.accelerate import acceleration
from mixtura.hf.growing_cache import GrowingLayer, GrowingWindowLayer, grow
from pico import pico, tokens


@pytest.mark.parametrize("make", WINDOWED.values(), ids=list(WINDOWED))
def test_a_plan_sees_what_the_windows_show(make):
    model = make()
    ids, mask = tokens(3, 12), left(3, 12, 1)
    expected, text = decoded(model, ids, mask), generated(model)
    mixtura.accelerate(model)
    assert (decoded(model, ids, mask) - expected).abs().max() < 1e-4
    assert torch.equal(generated(model), text)
    assert report(model) == {"planned": 15, "refusal": "", "through_modules": {}}


def test_the_window_matters_and_a_cache_of_everything_does_as_well():
    model, ids, mask = WINDOWED["window-qwen2"](), tokens(2, 12), left(2, 12, 0)
    seen = decoded(mixtura.accelerate(model), ids, mask)
    assert torch.allclose(decoded(model, ids, mask, DynamicCache()), seen, atol=1e-5)
    everything = decoded(mixtura.accelerate(pico("qwen2", **WIDE)), ids, mask)
    assert (everything - seen).abs().max() > 1e-3
    assert acceleration(model)["planned"] == 20


@pytest.mark.parametrize("window", [2, 700, 1500])
@pytest.mark.parametrize("length", [1024, 2300])
def test_windows_over_chunks(window, length):
    model = pico("mistral", **WIDE, num_hidden_layers=1, max_position_embeddings=4096, sliding_window=window)
    ids, mask = tokens(2, length + 2), left(2, length + 2, length - 200)
    place = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for make in (lambda m: m, mixtura.accelerate):
        make(model)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            for begin, end in ((0, length), (length, length + 1), (length + 1, length + 2)):
                given = {"attention_mask": mask[:, :end], "position_ids": place[:, begin:end]}
                out = model(ids[:, begin:end], **given, past_key_values=cache, logits_to_keep=1)
        found.append(out.logits)
    assert acceleration(model)["planned"] == 2
    assert (found[1] - found[0]).abs().max() < 1e-4


def test_drafts_are_cropped_from_windows():
    model, draft = WINDOWED["window-mistral"](), pico("mistral", **WIDE, num_hidden_layers=2, sliding_window=4)
    draft.generation_config.assistant_confidence_threshold = 0
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    text = model.generate(tokens(1, 6), **options)
    mixtura.accelerate(model), mixtura.accelerate(draft)
    assert torch.equal(model.generate(tokens(1, 6), assistant_model=draft, **options), text)
    assert acceleration(draft)["planned"] > 0


def test_a_cache_of_windows_does_not_grow():
    model = mixtura.accelerate(WINDOWED["window-qwen3"]())
    cache = DynamicCache(config=model.config)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "past_key_values": cache}
    model.generate(tokens(2, 150), max_new_tokens=150, **options)
    assert [layer.keys.shape[2] for layer in cache.layers] == [5, 299, 5]
    assert [layer.get_seq_length() for layer in cache.layers] == [299] * 3
    held = [layer.keys.untyped_storage().nbytes() // (4 * layer.keys[:, :, 0].numel()) for layer in cache.layers]
    assert held[0] == held[2] == 64
    assert acceleration(model)["planned"] == 149


def test_a_window_that_is_another_one_goes_through_the_modules():
    model, ids, mask = mixtura.accelerate(WINDOWED["window-mistral"]()), tokens(2, 5), left(2, 5, 0)
    other = DynamicCache(config=pico("mistral", sliding_window=7).config)
    decoded(model, ids, mask, other)
    fewer = DynamicCache(config=pico("mistral", sliding_window=5, num_hidden_layers=2).config)
    fewer.layers.pop()
    with pytest.raises(IndexError):
        decoded(model, ids[:, :3], mask[:, :3], fewer)
    assert acceleration(model)["through_modules"] == {"the cache has a window of 7, the model one of 5": 3}


def test_a_growing_window_is_a_sliding_one():
    config = pico("mistral", sliding_window=5, num_hidden_layers=1).config
    plain, growing = DynamicCache(config=config), DynamicCache(config=config)
    assert grow(growing)
    actions = [
        *[append(3, 2)] * 4,
        append(3, 1),
        append(3, 4),
        append(3, 9),
        append(3, 1),
        lambda c: c.reorder_cache(torch.tensor([2, 0, 0])),
        *[append(3, 1)] * 80,
        lambda c: c.batch_repeat_interleave(2),
        append(6, 3),
        lambda c: c.batch_select_indices(torch.tensor([5, 1])),
        lambda c: c.activate_past_recording(),
        *[append(2, 3)] * 3,
        lambda c: c.crop(-2),
        append(2, 1),
        lambda c: c.crop(0),
        *[append(2, 4)] * 30,
        lambda c: c.crop(-3),
        append(2, 2),
        lambda c: c.reset(),
        append(1, 3),
        lambda c: c.crop(-1),
        append(1, 1),
    ]
    for number, action in enumerate(actions):
        found = []
        for cache in (plain, growing):
            append.generator = torch.Generator().manual_seed(number)
            returned, layer = action(cache), cache.layers[0]
            found.append([*(returned or ()), layer.keys, layer.values])
            sizes = (layer.get_seq_length(), layer.get_mask_sizes(3), layer.get_max_length())
        assert sizes == (plain.layers[0].get_seq_length(), plain.layers[0].get_mask_sizes(3), 5), number
        for expected, seen in zip(*found, strict=True):
            assert (expected is seen is None) or torch.equal(expected, seen), number
    assert type(growing.layers[0]) is GrowingWindowLayer


def append(rows, length):
    def action(cache):
        return cache.update(*torch.randn(2, rows, 2, length, 4, generator=append.generator).unbind(), 0)

    return action


def test_a_first_token_is_a_step_and_is_remembered():
    model = WINDOWED["window-qwen3"]()
    with torch.no_grad():
        expected = model(tokens(1, 3)).logits[:, -1]
        mixtura.accelerate(model)
        cache = DynamicCache(config=model.config)
        model(tokens(1, 3)[:, :1], past_key_values=cache)
        seen = model(tokens(1, 3)[:, 1:], past_key_values=cache).logits[:, -1]
    assert torch.allclose(seen, expected, atol=1e-5)
    assert acceleration(model)["planned"] == 1
    assert {type(layer) for layer in cache.layers} == {GrowingLayer, GrowingWindowLayer}
