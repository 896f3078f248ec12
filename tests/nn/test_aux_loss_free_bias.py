"""What the catalogue says of balance by a bias.

T tokens, D width, E experts.
"""

import pytest
import torch

from mixtura.core import routing as r
from mixtura.core.errors import OptionError, ShapeError
from mixtura.core.selection import select
from mixtura.hf import convert, record
from mixtura.hf.balance import Balancer
from mixtura.nn import Experts, Mixture
from mixtura.nn.routers.aux_loss_free_bias import AuxLossFreeRouter, update_bias
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico, tokens

D, E = 8, 16


def router(**options):
    torch.manual_seed(0)
    made = AuxLossFreeRouter(D, E, **options)
    torch.nn.init.normal_(made.gate.weight, std=0.5)
    return made


def with_bias(made, generator):
    made.selection_bias.copy_(torch.randn(E, generator=generator) / 4)
    return made


def test_a_constant_on_all_biases_changes_nothing(generator):
    made = with_bias(router(groups=4, groups_kept=2), generator)
    hidden_TD = torch.randn(60, D, generator=generator).double()
    before = made.double()(hidden_TD)
    made.selection_bias += 0.5
    after = made(hidden_TD)
    assert torch.equal(after.indices_TK, before.indices_TK)
    assert torch.equal(after.weights_TK, before.weights_TK)


def test_the_bias_enters_neither_the_weights_nor_their_gradient(generator):
    """A bias that is large chooses the same experts for all; they weigh what they would have weighed."""
    made, hidden_TD = router(renormalize=None), torch.randn(20, D, generator=generator)
    made.selection_bias[[3, 7]] = 9.0
    routing = made(hidden_TD)
    assert routing.indices_TK.sort(-1).values.tolist() == [[3, 7]] * 20
    routing.weights_TK.sum().backward()
    scores_TE = (hidden_TD @ made.gate.weight.T).sigmoid()
    torch.testing.assert_close(routing.weights_TK.sum(-1), scores_TE[:, [3, 7]].sum(-1))
    (expected_ED,) = torch.autograd.grad(scores_TE[:, [3, 7]].sum(), made.gate.weight)
    torch.testing.assert_close(made.gate.weight.grad, expected_ED)
    assert not made.selection_bias.requires_grad


def test_softmax_without_bias_and_groups_is_top_k(generator):
    made, plain = router(score="softmax"), TopKRouter(D, E, 2)
    plain.gate = made.gate
    hidden_TD = torch.randn(20, D, generator=generator)
    assert all(torch.equal(a, b) for a, b in zip(made(hidden_TD), plain(hidden_TD), strict=True))


def test_keeping_all_groups_is_no_grouping(generator):
    hidden_TD = torch.randn(20, D, generator=generator)
    grouped, plain = router(groups=4, groups_kept=4), router()
    assert all(torch.equal(a, b) for a, b in zip(grouped(hidden_TD), plain(hidden_TD), strict=True))


def test_on_frozen_scores_the_load_becomes_even_and_stays_near(generator):
    """Steps of 1e-3 on 8192 tokens end in a cycle below a violation of 0.03."""
    made = router()
    logits_TE = torch.randn(8192, E, generator=generator) + torch.linspace(1, -1, E)
    violations = []
    for _ in range(520):
        routing = select(logits_TE, made.spec, made.selection_bias_E)
        violations.append(r.violation(r.load(routing)))
        made.end_step(r.counts(routing))
    assert violations[0] > 1
    assert max(violations[-20:]) < 0.03


def test_a_step_goes_by_the_sign_and_is_centered():
    made = router(rate=0.25)
    counts_E = torch.full((E,), 5)
    counts_E[0], counts_E[1] = 9, 1
    made.end_step(counts_E)
    assert made.selection_bias[:3].tolist() == [-0.25, 0.25, 0.0]
    counts_E[2] = 6
    made.end_step(counts_E)
    # mean 81 / 16: expert 0 and 2 are above it, all others below
    moved_E = torch.tensor([-0.5, 0.5, -0.25] + [0.25] * 13)
    torch.testing.assert_close(made.selection_bias, moved_E - moved_E.mean())
    assert made.selection_bias.mean().abs() < 1e-7


def test_without_centering_the_mean_moves():
    bias_E = torch.zeros(4)
    update_bias(bias_E, torch.tensor([9, 1, 1, 1]), 0.5, recenter=False)
    assert bias_E.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_nothing_moves_when_nothing_was_counted():
    """Not even to its center."""
    bias_E = torch.tensor([1.0, 2.0])
    update_bias(bias_E, torch.zeros(2, dtype=torch.int64), 0.5)
    assert bias_E.tolist() == [1.0, 2.0]


def test_balanced_experts_do_not_move_however_large_the_counts():
    """In float32 the mean of these would lie below them."""
    bias_E = torch.zeros(3)
    update_bias(bias_E, torch.full((3,), 5592407), 0.5, recenter=False)
    assert not bias_E.any()


def test_a_bias_of_a_native_router_can_be_moved_too():
    """Whatever its shape, and though it is a parameter."""
    bias_1E = torch.nn.Parameter(torch.zeros(1, 3))
    update_bias(bias_1E, torch.tensor([2, 1, 0]), 0.5)
    assert bias_1E.tolist() == [[-0.5, 0.0, 0.5]]
    with pytest.raises(ShapeError, match="counts_E must have 3 entries, got 2"):
        update_bias(bias_1E, torch.tensor([2, 1]), 0.5)


def test_in_a_model_of_low_precision_small_steps_still_count():
    made = router().to(torch.bfloat16)
    assert made.gate.weight.dtype == torch.bfloat16
    counts_E = torch.arange(E)
    for _ in range(1000):
        made.end_step(counts_E)
    assert made.selection_bias.dtype == torch.float32
    torch.testing.assert_close(made.selection_bias[0] - made.selection_bias[-1], torch.tensor(2.0), rtol=1e-3, atol=0)
    before_E = made.selection_bias.clone()
    assert torch.equal(made.half().float().selection_bias, before_E)


def test_equals_the_router_of_deepseek_v3(generator):
    from transformers import CONFIG_MAPPING
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = CONFIG_MAPPING["deepseek_v3"](
        hidden_size=D, n_routed_experts=E, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    native = DeepseekV3TopkRouter(config)
    made = with_bias(router(k=3, groups=4, groups_kept=2, scale=2.5), generator)
    with torch.no_grad():
        native.weight.copy_(made.gate.weight)
        native.e_score_correction_bias.copy_(made.selection_bias)
        hidden_TD = torch.randn(50, D, generator=generator)
        logits_TE, weights_TK, indices_TK = native(hidden_TD)
        routing = made(hidden_TD)
    assert torch.equal(routing.logits_TE, logits_TE)
    theirs_TE = torch.zeros(50, E).scatter(1, indices_TK, weights_TK)
    assert torch.equal(r.dense(routing) > 0, theirs_TE > 0)
    torch.testing.assert_close(r.dense(routing), theirs_TE, rtol=1e-6, atol=0)


def test_in_training_it_moves_once_a_step_by_all_that_was_routed():
    """Two micro-batches with padding under activation checkpointing: what is computed again is not counted again."""
    torch.manual_seed(0)
    made = AuxLossFreeRouter(32, 4, 2, rate=0.25, recenter=False)
    model = convert(pico("llama"), {1: Mixture(made, Experts(4, 32, 8))}).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    masks = [torch.ones(2, 9, dtype=torch.int64), (torch.arange(9) < 5).long().expand(2, 9)]
    balancer = Balancer(model, {})
    balancer.begin_step(tokens=sum(mask.sum() for mask in masks))
    counts_E = torch.zeros(4, dtype=torch.int64)
    for seed, mask in enumerate(masks):
        with record(model) as states:
            out = model(tokens(seed=seed), attention_mask=mask, use_cache=False).logits
        balancer.loss(states)
        out.square().sum().backward()
        counts_E += sum(r.counts(record.routing) for record in states[0].tape.records)
        assert not made.selection_bias.any()
    balancer.end_step()
    assert counts_E.sum() == 2 * (18 + 10)
    assert torch.equal(made.selection_bias, 0.25 * (14 - counts_E).sign())
    model.eval()(tokens())
    assert torch.equal(made.selection_bias, 0.25 * (14 - counts_E).sign())


def test_refuses():
    with pytest.raises(OptionError, match="rate must be at least 0, got -1"):
        router(rate=-1)
    with pytest.raises(OptionError, match="groups must divide the number of experts 16, got 3"):
        router(groups=3)
