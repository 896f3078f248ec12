"""What the catalogue says of top-k routing.

T tokens, D width, E experts, K slots a token.
"""

import warnings

import pytest
import torch

from mixtura.core.errors import MixturaWarning, OptionError
from mixtura.core.selection import SelectionSpec, select
from mixtura.nn import Experts, FeedForward, Mixture
from mixtura.nn.experts.feed_forward import view_expert
from mixtura.nn.routers.topk_softmax import TopKRouter

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
