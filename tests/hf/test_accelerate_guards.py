"""What a plan must not run into: foreign caches, modes of torch, wrong tokens, other threads, changed models."""

import contextlib
import copy
import io
import pickle
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

import mixtura
from hf.decoders import WIDE, generated
from mixtura.core.errors import MixturaWarning
from mixtura.hf.accelerate import acceleration
from mixtura.hf.growing_cache import grow
from pico import pico, tokens
from pico_native import native


@pytest.fixture
def plain():
    return pico("llama", **WIDE).eval()


@pytest.fixture
def model(plain):
    return mixtura.accelerate(copy.deepcopy(plain))


@torch.no_grad()
def filled(model, rows):
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens(rows, 6), past_key_values=cache)
    return cache


@torch.no_grad()
def step(model, cache, ids, **given):
    return model(input_ids=ids, past_key_values=cache, **given).logits


def continued(model, rows):
    ids = tokens(rows, 5)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )


def reasons(model):
    return list(acceleration(model)["through_modules"])


def test_autocast_goes_through_the_modules(plain, model):
    with torch.autocast("cpu", torch.bfloat16):
        expected, seen = (step(one, filled(one, 2), tokens(2, 1)) for one in (plain, model))
        assert torch.equal(generated(model), generated(plain))
    assert seen.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(seen, expected)
    assert reasons(model) == ["autocast is on"]


def test_a_cache_that_autocast_filled_is_not_written_to_as_float32(plain, model):
    caches = []
    for one in (plain, model):
        with torch.autocast("cpu", torch.bfloat16):
            caches.append(filled(one, 2))
    expected, seen = (step(one, cache, tokens(2, 1)) for one, cache in zip((plain, model), caches, strict=True))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert reasons(model) == ["the cache is of another shape or type than the model's"]


@pytest.mark.parametrize("token", [-1, 128, 10**9])
def test_tokens_outside_of_the_vocabulary_are_refused(model, token):
    assert model.config.vocab_size <= 128
    with pytest.raises(IndexError):
        step(model, filled(model, 2), torch.tensor([[1], [token]]))


def test_tokens_that_are_no_whole_numbers_are_refused_as_ever(model):
    with pytest.raises(RuntimeError, match="Expected tensor for argument #1 'indices'"):
        step(model, filled(model, 1), torch.tensor([[1.5]]))


@pytest.mark.parametrize(("held", "given"), [(2, 3), (2, 1), (1, 64)])
def test_a_cache_of_other_rows_is_refused_as_ever(model, held, given):
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        step(model, filled(model, held), tokens(given, 1))


def test_a_cache_of_another_model_is_refused_as_ever(model):
    other = pico("llama", **{**WIDE, "num_key_value_heads": 1})
    assert model.config.num_key_value_heads != 1
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        step(model, filled(other, 2), tokens(2, 1))


def test_threads_take_turns(plain, model):
    expected, wrong = {n: continued(plain, n) for n in (1, 2)}, []

    def work(rows):
        wrong.extend(n for n in range(10) if not torch.equal(continued(model, rows), expected[rows]))

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert acceleration(model)["through_modules"] == {}


def test_what_began_in_inference_mode_goes_on_outside_of_it(plain, model):
    text = generated(plain)
    with torch.inference_mode():
        assert torch.equal(generated(model), text)
        cache = filled(model, 2)
    assert torch.equal(generated(model), text)
    ids = tokens(2, 3)
    torch.testing.assert_close(step(model, cache, ids), step(plain, filled(plain, 2), ids), rtol=1e-4, atol=1e-5)
    assert step(model, cache, tokens(2, 1)).shape == (2, 1, model.config.vocab_size)


def test_accelerate_again_looks_again(model):
    generated(model)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    generated(model)
    assert reasons(model) == ["its modules were exchanged"]
    mixtura.accelerate(model)
    generated(model)
    assert reasons(model) == []
    mixtura.accelerate(model, bits=8)
    generated(model)
    assert reasons(model) == []
    assert acceleration(model)["large_pages"]["size"] == sum(
        t.nbytes for t in {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values()
    )


def exchange_method(model):
    feed = model.model.layers[1].mlp
    before = feed.forward
    feed.forward = lambda h: 50 * before(h)


def exchange_class(model):
    feed = model.model.layers[1].mlp

    class Fifty(type(feed)):
        def forward(self, h):
            return 50 * super().forward(h)

    feed.__class__ = Fifty


def delete_setting(model):
    del model.model.layers[1].self_attn.scaling_note


CHANGES = {
    "forward of its LlamaMLP was exchanged": exchange_method,
    "the class of one of its modules was exchanged": exchange_class,
    "its setting scaling_note was changed": delete_setting,
}


@pytest.mark.parametrize("reason", CHANGES)
def test_what_was_exchanged_counts(plain, reason):
    plain.model.layers[1].self_attn.scaling_note = 3.0
    model = mixtura.accelerate(copy.deepcopy(plain))
    generated(model)
    for one in (plain, model):
        CHANGES[reason](one)
    ids = tokens(2, 1)
    torch.testing.assert_close(step(model, filled(model, 2), ids), step(plain, filled(plain, 2), ids))
    assert reasons(model) == [reason]


def test_a_method_that_was_exchanged_before_counts(plain):
    exchange_method(plain)
    with pytest.warns(MixturaWarning, match="forward of its LlamaMLP was exchanged"):
        mixtura.accelerate(plain)


@pytest.mark.parametrize(("family", "name"), [("gemma2", "final_logit_softcapping"), ("granite", "logits_scaling")])
def test_settings_of_the_configuration_count(family, name):
    plain = pico(family, **WIDE).eval()
    model = mixtura.accelerate(copy.deepcopy(plain))
    generated(model)
    for one in (plain, model):
        setattr(one.config, name, 0.5)
    ids = tokens(2, 1)
    torch.testing.assert_close(step(model, filled(model, 2), ids), step(plain, filled(plain, 2), ids))
    assert reasons(model) == [f"its setting {name} was changed"]


def test_what_a_cache_has_lent_stays():
    cache = DynamicCache()
    grow(cache)
    cache.update(torch.ones(1, 1, 8, 4), torch.ones(1, 1, 8, 4), 0)
    lent = cache.layers[0].keys
    cache.crop(-3)
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    assert lent.eq(1).all()
    assert cache.layers[0].keys[0, 0, :, 0].tolist() == [1, 1, 1, 1, 1, 0, 0]


def test_it_can_be_pickled(model):
    text = generated(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(generated(twin), text)
    assert acceleration(twin)["planned"] > 0
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(generated(torch.load(file, weights_only=False)), text)


def test_a_compiled_forward_is_told(plain):
    plain.forward = torch.compile(plain.forward, backend="eager")
    with pytest.warns(MixturaWarning, match="its forward was exchanged"):
        mixtura.accelerate(plain)


def test_a_model_with_an_adapter_is_accelerated_inside(plain):
    adapted = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    text = generated(adapted)
    with pytest.warns(MixturaWarning, match="stands where a plan needs a plain Linear"):
        assert mixtura.accelerate(adapted) is adapted
    assert torch.equal(generated(adapted), text)
    assert acceleration(adapted)["operations"] > 0


def test_modules_stay_in_their_mode(plain):
    plain.train()
    plain.model.layers[1].eval()
    before = [module.training for module in plain.modules()]
    mixtura.accelerate(plain)
    assert [module.training for module in plain.modules()] == before


def test_who_counts_operations_sees_them(plain, model):
    counts = []
    for one in (plain, model):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            generated(one)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


TRACED = {
    "dense": lambda: mixtura.accelerate(pico("llama", **WIDE)),
    "dense of 8 bits": lambda: mixtura.accelerate(pico("llama", **WIDE), bits=8),
    "experts": lambda: mixtura.accelerate(native("olmoe", **WIDE)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", TRACED)
def test_a_trace_computes_anew(name):
    class Logits(torch.nn.Module):
        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    wrapped, (first, second) = Logits(), (tokens(1, 6), tokens(1, 6).flip(1))
    wrapped.model = TRACED[name]().eval()
    with torch.no_grad():
        traced = torch.jit.trace(wrapped, (first,), check_trace=False)
        torch.testing.assert_close(traced(second), wrapped(second), rtol=2e-2, atol=2e-2)
        assert not torch.allclose(traced(second), wrapped(first), rtol=2e-2, atol=2e-2)


def test_the_default_type_of_numbers_does_not_matter(plain, model):
    text = generated(plain)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(continued(model, 3), continued(plain, 3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(generated(model), text)


def test_positions_of_another_shape_are_taken_as_ever(plain, model):
    place = torch.tensor([6])
    expected, seen = (step(one, filled(one, 1), tokens(1, 1), position_ids=place) for one in (plain, model))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["minimax", "inkling_text"])
def test_families_with_a_cache_of_their_own_work_as_ever(family):
    plain = native(family).eval()
    with contextlib.suppress(MixturaWarning), pytest.warns(MixturaWarning):
        model = mixtura.accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        expected, seen = (one(input_ids=tokens(2, 6)).logits for one in (plain, model))
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
