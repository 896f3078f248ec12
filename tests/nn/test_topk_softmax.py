"""What the catalogue says of top-k routing.

T tokens, D width, E experts, K slots a token.
"""

import warnings

import pytest
import torch
from torch.nn import functional as Fn
from torch.utils.checkpoint import checkpoint

from mixtura.core import routing as r
from mixtura.core.errors import MixturaWarning, OptionError
from mixtura.core.selection import SelectionSpec, select
from mixtura.nn import Experts, FeedForward, Mixture
from mixtura.nn.experts.feed_forward import view_expert
from mixtura.nn.routers.adamoe import AdaMoERouter
from mixtura.nn.routers.aux_loss_free_bias import AuxLossFreeRouter
from mixtura.nn.routers.gating_residual import GatingResidualRouter
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.nn.state import checkpoint_context

T, D, E, F = 20, 8, 4, 6


def mixture(k=2, **options):
    torch.manual_seed(0)
    made = Mixture(TopKRouter(D, E, k, **options), Experts(E, D, F))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def dense_twin(experts, e):
    """Expert e as a layer of its own."""
    twin, view = FeedForward(experts.dim, experts.width), view_expert(experts, e)
    with torch.no_grad():
        twin.gate_proj.weight.copy_(view.gate_FD)
        twin.up_proj.weight.copy_(view.up_FD)
        twin.down_proj.weight.copy_(view.down_DF)
    return twin


def test_mixtral_is_granite_and_gpt_oss(generator):
    """Softmax over all, choose, divide by the sum equals softmax over the chosen logits; of sigmoids that is false."""
    logits_TE = torch.randn(T, E, generator=generator, dtype=torch.float64)
    for score, same in (("softmax", True), ("sigmoid", False)):
        one = select(logits_TE, SelectionSpec(k=2, score=score, renormalize=1))
        other = select(logits_TE, SelectionSpec(k=2, score="softmax", order="topk-score"))
        assert torch.equal(one.indices_TK, other.indices_TK)
        assert torch.allclose(one.weights_TK, other.weights_TK) == same


def test_all_experts_are_the_dense_softmax_mixture(generator):
    layer, hidden_TD = mixture(k=E, renormalize=None), torch.randn(T, D, generator=generator)
    gates_TE = layer.router.gate(hidden_TD).softmax(-1)
    expected_TD = sum(gates_TE[:, e, None] * dense_twin(layer.experts, e)(hidden_TD) for e in range(E))
    torch.testing.assert_close(layer(hidden_TD), expected_TD, rtol=1e-4, atol=1e-5)


def test_one_expert_is_the_plain_feed_forward(generator):
    hidden_TD = torch.randn(T, D, generator=generator)
    layer = Mixture(TopKRouter(D, 1, 1, renormalize=None), Experts(1, D, F))
    assert (layer.router(hidden_TD).weights_TK == 1).all()
    torch.testing.assert_close(layer(hidden_TD), dense_twin(layer.experts, 0)(hidden_TD))


def gate_gradient(layer, hidden_TD):
    (layer(hidden_TD) ** 2).sum().backward()
    return layer.router.gate.weight.grad.abs().max().item()


@pytest.mark.parametrize("options", [{}, {"order": "topk-score", "renormalize": None}], ids=str)
def test_a_renormalized_top_1_gate_gets_no_gradient_and_says_so(options, generator):
    hidden_TD = torch.randn(T, D, generator=generator)
    with pytest.warns(MixturaWarning, match="top-1 gate whose weight is renormalized is constant 1") as caught:
        dead = mixture(k=1, **options)
    assert caught[0].filename == __file__
    alive = mixture(k=1, renormalize=None)
    assert gate_gradient(dead, hidden_TD) < 1e-4 * gate_gradient(alive, hidden_TD)


@pytest.mark.parametrize(
    "build",
    [
        lambda: AuxLossFreeRouter(D, E, 1),
        lambda: AuxLossFreeRouter(D, E, 1, score="softmax"),
        lambda: GatingResidualRouter(D, E, 1),
        lambda: AdaMoERouter(D, E, 2, 1),
    ],
    ids=["sigmoid", "softmax", "residual", "null"],
)
def test_other_routers_say_so_too(build):
    with pytest.warns(MixturaWarning, match="top-1 gate whose weight is renormalized is constant 1") as caught:
        build()
    assert caught[0].filename == __file__


def test_one_expert_of_one_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TopKRouter(D, 1, 1)
        TopKRouter(D, E, 2)


def test_switches_reach_the_selection(generator):
    hidden_TD = torch.randn(T, D, generator=generator)
    router = TopKRouter(D, E, 3, score="sigmoid", renormalize=2, scale=2.5, bias=True)
    routing = router(hidden_TD)
    expected = select(routing.logits_TE, SelectionSpec(k=3, score="sigmoid", renormalize=2, scale=2.5))
    assert torch.equal(routing.weights_TK, expected.weights_TK)
    assert router.gate.bias.shape == (E,)


def test_a_weight_on_the_input_is_llama_4(generator):
    """Each expert sees its token times the sigmoid of its logit; the outputs are added."""
    layer = mixture(k=2, score="sigmoid", order="topk-score", renormalize=None, weight_on="input")
    hidden_TD = torch.randn(T, D, generator=generator)
    logits_TE = layer.router.gate(hidden_TD)
    chosen_TK = logits_TE.topk(2).indices
    expected_TD = torch.zeros(T, D)
    for t in range(T):
        for e in chosen_TK[t].tolist():
            expected_TD[t] += dense_twin(layer.experts, e)(hidden_TD[t] * logits_TE[t, e].sigmoid())
    torch.testing.assert_close(layer(hidden_TD), expected_TD, rtol=1e-4, atol=1e-5)


def test_a_weight_on_the_input_equals_the_native_llama_4(generator):
    from transformers import CONFIG_MAPPING
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    from mixtura.hf.families import selection_spec

    config = CONFIG_MAPPING["llama4_text"](
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2, intermediate_size_mlp=F
    )
    native = Llama4TextMoe(config)
    for parameter in native.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = Mixture(
        TopKRouter(D, E, 2, score="sigmoid", order="topk-score", renormalize=None, weight_on="input"),
        Experts(E, D, F, transposed=True),
        FeedForward(D, F),
    )
    assert ours.router.spec == selection_spec(config)
    with torch.no_grad():
        ours.router.gate.weight.copy_(native.router.weight)
        ours.experts.gate_up_proj.copy_(native.experts.gate_up_proj)
        ours.experts.down_proj.copy_(native.experts.down_proj)
        ours.shared.load_state_dict(native.shared_expert.state_dict())
        hidden_BSD = torch.randn(2, 5, D, generator=generator)
        expected_TD = native(hidden_BSD)[0]
        torch.testing.assert_close(ours(hidden_BSD).view(-1, D), expected_TD.view(-1, D), rtol=1e-5, atol=1e-5)


def test_k_beyond_the_experts_is_refused():
    with pytest.raises(OptionError, match="k must be at most the number of experts 4, got 5"):
        TopKRouter(D, E, 5)


def test_equals_the_router_of_mixtral(generator):
    from transformers import CONFIG_MAPPING
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    native = MixtralTopKRouter(CONFIG_MAPPING["mixtral"](hidden_size=D, num_local_experts=E, num_experts_per_tok=2))
    router = TopKRouter(D, E, 2)
    with torch.no_grad():
        native.weight.copy_(router.gate.weight)
        hidden_TD = torch.randn(T, D, generator=generator)
        logits_TE, weights_TK, indices_TK = native(hidden_TD)
        routing = router(hidden_TD)
    assert torch.equal(routing.logits_TE, logits_TE)
    assert torch.equal(routing.weights_TK, weights_TK)
    assert torch.equal(routing.indices_TK, indices_TK)


def noisy(noise, **options):
    torch.manual_seed(0)
    made = TopKRouter(D, E, 2, noise=noise, **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def test_learned_noise_is_that_of_shazeer(generator):
    """H = x W + n softplus(x N), the best k of H kept, softmax of those; written out with the same random numbers."""
    router, hidden_TD = noisy("learned", order="topk-score", renormalize=None), torch.randn(T, D, generator=generator)
    torch.manual_seed(1)
    routing = router(hidden_TD)
    torch.manual_seed(1)
    deviation_TE = Fn.softplus(hidden_TD @ router.gate.deviation.weight.T)
    noisy_TE = hidden_TD @ router.gate.weight.T + torch.randn(T, E) * deviation_TE
    lowest_T1 = noisy_TE.topk(2).values[:, -1:]
    torch.testing.assert_close(
        r.dense(routing), noisy_TE.masked_fill(noisy_TE < lowest_T1, -torch.inf).softmax(-1), rtol=1e-5, atol=1e-6
    )
    routing.weights_TK[:, 0].sum().backward()
    assert router.gate.weight.grad.any()
    assert router.gate.deviation.weight.grad.any()


def test_learned_noise_starts_at_zero_and_so_uses_all_experts(generator):
    router, hidden_TD = TopKRouter(D, E, 2, noise="learned"), torch.randn(400, D, generator=generator)
    assert not any(parameter.any() for parameter in router.parameters())
    torch.manual_seed(1)
    assert r.violation(r.load(router(hidden_TD))) < 0.2
    assert r.load(router.eval()(hidden_TD)).tolist() == [0.5, 0.5, 0.0, 0.0]


def test_jitter_multiplies_the_token_by_numbers_near_1(generator):
    router, hidden_TD = noisy("jitter", jitter=0.25), torch.randn(T, D, generator=generator)
    torch.manual_seed(1)
    logits_TE = router(hidden_TD).logits_TE
    torch.manual_seed(1)
    factors_TD = torch.empty(T, D).uniform_(0.75, 1.25)
    torch.testing.assert_close(logits_TE, (hidden_TD * factors_TD) @ router.gate.weight.T)
    torch.manual_seed(1)
    low_TE = router(hidden_TD.bfloat16()).logits_TE
    torch.manual_seed(1)
    assert torch.equal(low_TE, router(hidden_TD.bfloat16().float()).logits_TE)


@pytest.mark.parametrize("noise", ["learned", "jitter"])
def test_noise_is_for_training_alone(noise, generator):
    router, hidden_TD = noisy(noise), torch.randn(T, D, generator=generator)
    assert not torch.equal(router(hidden_TD).logits_TE, router(hidden_TD).logits_TE)
    plain = TopKRouter(D, E, 2)
    plain.gate.weight = router.gate.weight
    assert all(torch.equal(a, b) for a, b in zip(router.eval()(hidden_TD), plain(hidden_TD), strict=True))


def gradients(noise, checkpointed, hidden_TD, **options):
    torch.manual_seed(0)
    layer = Mixture(noisy(noise), Experts(E, D, F))
    torch.manual_seed(1)
    if checkpointed:
        out_TD = checkpoint(layer, hidden_TD, use_reentrant=False, context_fn=checkpoint_context, **options)
    else:
        out_TD = layer(hidden_TD)
    torch.manual_seed(2)
    out_TD.square().sum().backward()
    return [parameter.grad for parameter in layer.router.parameters()]


@pytest.mark.parametrize("noise", ["learned", "jitter"])
def test_noise_is_the_same_in_recomputation(noise, generator):
    hidden_TD = torch.randn(T, D, generator=generator)
    plain = gradients(noise, False, hidden_TD)
    again = gradients(noise, True, hidden_TD)
    assert all(a.any() and torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_noise_is_refused():
    with pytest.raises(OptionError, match="noise must be one of 'none', 'learned', 'jitter', got 'gumbel'"):
        TopKRouter(D, E, noise="gumbel")
    with pytest.raises(OptionError, match=r"jitter must lie in 0 .. 1, got 1"):
        TopKRouter(D, E, noise="jitter", jitter=1)
