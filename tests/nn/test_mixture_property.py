"""Any mixture against loops over tokens and slots, and through its own configuration: forms, layouts, shapes, backends.

T tokens, D width, E experts, K slots a token, F expert width.
"""

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mixtura.core.errors import MixturaWarning
from mixtura.nn import ExpertGroup, Experts, FeedForward, Mixture
from mixtura.nn.backends import BACKENDS
from mixtura.nn.experts.forms import ConstantExperts, CopyExperts, ZeroExperts
from mixtura.nn.routers.topk_softmax import TopKRouter

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@st.composite
def feed_forwards(draw, D):
    """Experts in any layout."""
    gated = draw(st.booleans())
    return Experts(
        draw(st.integers(1, 4)),
        D,
        draw(st.integers(1, 5)),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        gated=gated,
        bias=draw(st.booleans()),
        transposed=draw(st.booleans()),
        interleaved=gated and draw(st.booleans()),
    )


@st.composite
def mixtures(draw):
    """One to four forms, any router of top-k, a shared expert or none."""
    D = draw(st.integers(1, 6))
    other = st.builds(
        lambda form, E: form(E, D), st.sampled_from([ZeroExperts, CopyExperts, ConstantExperts]), st.integers(1, 3)
    )
    forms = draw(st.lists(feed_forwards(D) | other, min_size=1, max_size=4))
    experts = forms[0] if len(forms) == 1 else ExpertGroup(forms)
    options = {
        "k": st.integers(1, experts.num_experts),
        "score": st.sampled_from(["softmax", "sigmoid"]),
        "order": st.sampled_from(["score-topk", "topk-score"]),
        "renormalize": st.sampled_from([None, 1, 2]),
        "scale": st.sampled_from([1.0, 2.5]),
        "weight_on": st.sampled_from(["output", "input"]),
        "bias": st.booleans(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixturaWarning)  # a top-1 gate without gradient is no concern here
        router = TopKRouter(D, experts.num_experts, **{name: draw(option) for name, option in options.items()})
    shared = draw(
        st.none() | st.builds(FeedForward, st.just(D), st.integers(1, 4), gated=st.booleans(), bias=st.booleans())
    )
    made = Mixture(router, experts, shared).double().requires_grad_(False)
    torch.manual_seed(draw(st.integers(0, 99)))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made, torch.randn(draw(st.integers(0, 5)), D, dtype=torch.float64)


def halves(first_C, interleaved):
    """Gate and up, from the rows that hold both."""
    return (
        (first_C[::2], first_C[1::2]) if interleaved else (first_C[: len(first_C) // 2], first_C[len(first_C) // 2 :])
    )


def feed_forward_of(form, e, x_D):
    """f_e of one token, from the stored weights and the configuration."""
    config, weights = form.method_config, {name: parameter[e] for name, parameter in form.named_parameters()}
    first = "gate_up_proj" if config["gated"] else "up_proj"
    turned = {name: w.T if config["transposed"] and w.ndim == 2 else w for name, w in weights.items()}
    inner_C = turned[first] @ x_D + turned.get(f"{first}_bias", 0)
    act = ACTIVATIONS[config["activation"]]
    if config["gated"]:
        gate_F, up_F = halves(inner_C, config["interleaved"])
        inner_C = act(gate_F) * up_F
    else:
        inner_C = act(inner_C)
    return turned["down_proj"] @ inner_C + turned.get("down_proj_bias", 0)


def one_expert(experts, e, x_D):
    """f_e of one token, whatever its form."""
    for form in experts.forms if isinstance(experts, ExpertGroup) else [experts]:
        if e >= form.num_experts:
            e -= form.num_experts
        elif isinstance(form, Experts):
            return feed_forward_of(form, e, x_D)
        elif isinstance(form, ConstantExperts):
            a_2 = (form.mixer[e] @ x_D).softmax(0)
            return a_2[0] * x_D + a_2[1] * form.vector[e]
        else:
            return x_D if isinstance(form, CopyExperts) else torch.zeros_like(x_D)
    raise IndexError(e)


def loops(made, hidden_TD):
    """The formula of the layer, token by token and slot by slot."""
    routing, rows = made.router(hidden_TD), []
    for t, x_D in enumerate(hidden_TD):
        y_D = torch.zeros_like(x_D) if made.shared is None else made.shared(x_D)
        for e, w in zip(routing.indices_TK[t].tolist(), routing.weights_TK[t], strict=True):
            on_input = made.router.weight_on == "input"
            y_D = y_D + (one_expert(made.experts, e, w * x_D) if on_input else w * one_expert(made.experts, e, x_D))
        rows.append(y_D)
    return torch.stack(rows) if rows else torch.zeros_like(hidden_TD)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=mixtures())
def test_it_is_the_formula_on_every_backend(backend, case):
    made, hidden_TD = case
    for module in made.modules():
        if isinstance(module, Experts):
            module.backend = BACKENDS[backend]
    torch.testing.assert_close(made(hidden_TD), loops(made, hidden_TD), rtol=1e-9, atol=1e-9)


@given(case=mixtures())
def test_its_configuration_and_weights_give_it_back_bit_for_bit(case):
    made, hidden_TD = case
    config = made.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixturaWarning)
        other = Mixture.from_config(json.loads(json.dumps(config)), layer="3").double()
    assert other.config == config
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(hidden_TD), made(hidden_TD))
    assert {name: p.shape for name, p in other.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}


@given(case=mixtures(), shape=st.lists(st.integers(1, 2), max_size=3))
def test_any_leading_shape_is_the_same_tokens(case, shape):
    made, hidden_TD = case
    hidden = hidden_TD.expand(*shape, *hidden_TD.shape)
    torch.testing.assert_close(made(hidden), made(hidden_TD).expand_as(hidden), rtol=1e-9, atol=1e-9)


@given(case=mixtures())
def test_a_token_does_not_see_the_others(case):
    made, hidden_TD = case
    whole_TD = made(hidden_TD)
    for t in range(len(hidden_TD)):
        torch.testing.assert_close(made(hidden_TD[t : t + 1]), whole_TD[t : t + 1], rtol=1e-9, atol=1e-9)
