"""The layer: its configuration, its shared expert, its precision."""

import json

import pytest
import torch

from mixtura.core.errors import OptionError, UnknownNameError
from mixtura.nn import ExpertGroup, Experts, FeedForward, LinearGate, Mixture, Router
from mixtura.nn.experts.forms import ConstantExperts, ZeroExperts
from mixtura.nn.routers.topk_softmax import TopKRouter

D = 8


def mixtures():
    torch.manual_seed(0)
    plain = Experts(4, D, 6, activation="gelu", gated=False, bias=True)
    group = ExpertGroup([Experts(2, D, 6), ZeroExperts(1, D), ConstantExperts(1, D)])
    return {
        "plain": Mixture(TopKRouter(D, 4, 2), plain),
        "shared": Mixture(TopKRouter(D, 4, 3, score="sigmoid"), Experts(4, D, 6), FeedForward(D, 5, bias=True)),
        "group": Mixture(TopKRouter(D, 4, 2), group, FeedForward(D, 3, gated=False)),
        "transposed": Mixture(TopKRouter(D, 4, weight_on="input"), Experts(4, D, 6, transposed=True, interleaved=True)),
    }


@pytest.mark.parametrize("name", mixtures())
def test_the_configuration_builds_an_equal_one(name, generator):
    made, hidden = mixtures()[name], torch.randn(2, 5, D, generator=generator)
    other = Mixture.from_config(json.loads(json.dumps(made.config)), layer="7")
    assert other.config == made.config
    assert other.layer == "7"
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(hidden), made(hidden))


def test_a_configuration_is_what_the_catalogue_calls_things():
    assert mixtures()["shared"].config == {
        "router": {
            "method": "topk-softmax",
            "dim": 8,
            "num_experts": 4,
            "k": 3,
            "score": "sigmoid",
            "order": "score-topk",
            "renormalize": 1.0,
            "scale": 1.0,
            "weight_on": "output",
            "bias": False,
            "noise": "none",
            "jitter": 0.01,
        },
        "experts": [
            {
                "method": "feed-forward",
                "num_experts": 4,
                "dim": 8,
                "width": 6,
                "activation": "silu",
                "gated": True,
                "bias": False,
                "transposed": False,
                "interleaved": False,
            }
        ],
        "shared": {"dim": 8, "width": 5, "activation": "silu", "gated": True, "bias": True},
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"extra": 1}, OptionError, "entries router, experts, shared; got"),
        ({"shared": {"dim": 8}}, OptionError, "shared: .*width"),
        ({"shared": {"dim": 8, "width": 5, "depth": 2}}, OptionError, "shared: .*depth"),
        ({"router": {"method": "topk"}}, UnknownNameError, "unknown method 'topk'"),
        ({"router": {"method": "topk-softmax", "dims": 8}}, OptionError, "did you mean 'dim'"),
        (
            {"router": {"method": "topk-softmax", "dim": 8, "num_experts": 3}},
            OptionError,
            "among 3 experts, but there are 4",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        Mixture.from_config({**mixtures()["plain"].config, **change})


def test_a_configuration_without_experts_is_refused():
    with pytest.raises(OptionError, match=r"got \['router'\]"):
        Mixture.from_config({"router": mixtures()["plain"].config["router"]})


def test_a_part_that_is_no_method_has_no_configuration():
    gate = Router(LinearGate(D, 4), TopKRouter(D, 4).spec, 4)
    with pytest.raises(OptionError, match="Router has no configuration: register the class with @method"):
        _ = Mixture(gate, Experts(4, D, 6)).config


def test_the_shared_expert_is_added_with_weight_1(generator):
    made, hidden = mixtures()["shared"], torch.randn(5, D, generator=generator)
    whole, shared = made(hidden), made.shared
    made.shared = None
    torch.testing.assert_close(whole, made(hidden) + shared(hidden))


@pytest.mark.parametrize("name", mixtures())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_output_has_the_type_of_the_tokens(name, dtype, generator):
    made, hidden = mixtures()[name], torch.randn(2, 5, D, generator=generator)
    expected = made(hidden)
    out = made.to(dtype)(hidden.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", mixtures())
def test_autocast(name, generator):
    made, hidden = mixtures()[name], torch.randn(2, 5, D, generator=generator, requires_grad=True)
    expected = made(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(hidden)
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.01)
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


def test_tokens_in_any_memory_order(generator):
    made, hidden = mixtures()["group"], torch.randn(D, 5, 2, generator=generator).permute(2, 1, 0)
    torch.testing.assert_close(made(hidden), made(hidden.contiguous()))
