"""Laws of every registered router inside of a language model of the family: saved, loaded, generating, checkpointed.

T tokens, D width.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from laws.building import key, rows
from mixtura.hf import convert, mixtures, record
from mixtura.nn import ExpertGroup, Experts, Mixture
from mixtura.nn.experts.forms import ZeroExperts
from pico import pico, tokens

SIZES = {"dim": 32, "num_experts": 4, "vocabulary": 64, "null_experts": 2, "k": 2}
LAYERS = (0, 2)
every_router = pytest.mark.parametrize("row", rows("router"), ids=key)


def mixture(row):
    """A router of that kind and the experts that it needs."""
    router = row(**{name: size for name, size in SIZES.items() if name in row.options})
    nulls = 0 if router.spec is None else router.spec.null_experts
    experts = Experts(router.num_experts - nulls, 32, 16)
    return Mixture(router, ExpertGroup([experts, ZeroExperts(nulls, 32)]) if nulls else experts)


def model_with(row):
    """A pico model, some of whose layers have such mixtures, with weights and buffers as after some training."""
    model = convert(pico("llama"), {i: mixture(row) for i in LAYERS}, allow=[] if row.causal else [row.key])
    generator = torch.Generator().manual_seed(0)
    for layer in mixtures(model).values():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        layer.router.end_step(torch.arange(layer.router.num_experts))
    return model


def logits(model, x, **options):
    with torch.no_grad():
        return model(x, **options).logits


@every_router
def test_is_saved_and_loaded_bit_equal(row, tmp_path):
    model, x = model_with(row), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(loaded, x), logits(model, x))


@every_router
def test_loads_in_bfloat16_what_was_saved(row, tmp_path):
    """Buffers keep the type that their router gave them."""
    model = model_with(row)
    model.save_pretrained(tmp_path)
    loaded, cast = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), model.to(torch.bfloat16)
    ours, theirs = cast.state_dict(), loaded.state_dict()
    assert {name: value.dtype for name, value in ours.items()} == {name: v.dtype for name, v in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@every_router
def test_generates_with_a_cache_what_a_full_forward_says(row):
    """Unless it sees the future; then it generates too, by other logits."""
    model, x = model_with(row), tokens()
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = model.generate(x, attention_mask=torch.ones_like(x), **options)
    whole = logits(model, made.sequences)[:, 8:-1]
    same = torch.allclose(torch.stack(made.logits, 1), whole, rtol=1e-4, atol=1e-4)
    assert same == row.causal


@every_router
def test_left_padding_changes_nothing(row):
    model, x = model_with(row), tokens()
    left = torch.cat([torch.zeros(2, 3, dtype=torch.int64), x], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, 12)
    padded = logits(model, left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    torch.testing.assert_close(padded[:, 3:], logits(model, x), rtol=1e-4, atol=1e-5)


@every_router
def test_activation_checkpointing_changes_no_gradient(row):
    """Of a loss of the output and of what is on the tape, over two forwards before one backward."""
    plain = model_with(row).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        with record(model) as states:
            outs = [model(tokens(seed=seed), use_cache=False).logits for seed in (0, 1)]
        losses = [out.square().sum() for out in outs]
        losses += [record.routing.logits_TE.square().sum() for state in states for record in state.tape.records]
        sum(losses).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in checkpointed.named_parameters():
        theirs = expected[name].grad
        assert (parameter.grad is None) == (theirs is None), name
        assert theirs is None or torch.equal(parameter.grad, theirs), name
