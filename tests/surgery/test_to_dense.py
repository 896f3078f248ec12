"""From mixtures back to dense layers: upcycling is undone bit for bit, and what cannot be held is refused by name."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtura.core import MixturaError, NotExpressibleError, OptionError, registry
from mixtura.hf import convert, mixtures
from mixtura.nn import ExpertGroup, Experts, Mixture
from mixtura.nn.experts.feed_forward import view_expert
from mixtura.nn.experts.forms import ZeroExperts
from mixtura.nn.mixture import FeedForward
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.surgery.to_dense import merged, to_dense
from mixtura.surgery.upcycle import upcycle
from pico import DENSE, pico, tokens

D, F = 32, 48


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def mixture(k=2, shared=0, width=F, **options):
    """Four experts that differ, with biases that are not 0."""
    torch.manual_seed(1)
    experts = Experts(4, D, width, **options)
    common = FeedForward(D, shared, **options) if shared else None
    made = Mixture(TopKRouter(D, 4, k), experts, common)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(True)


@pytest.mark.parametrize("base", DENSE)
@pytest.mark.parametrize(
    ("options", "back"),
    [
        ({"copies": 4, "shards": 1}, {}),
        ({"copies": 3, "shards": 1}, {}),
        ({"copies": 3, "shards": 2}, {"shards": 2}),
        ({"copies": 3, "shards": 4, "k": 4}, {"shards": 4, "experts": 1}),
        ({"copies": 2, "shards": 2, "shared": 0.25}, {"shards": 2, "experts": [3, 1]}),
    ],
    ids=["four", "three", "shards", "one copy", "shared"],
)
def test_upcycling_is_undone_bit_for_bit(base, options, back, tmp_path):
    dense = pico(base)
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    out, kind = logits(dense), type(dense)
    model = upcycle(dense, layers="all", **options).model
    made, receipt = to_dense(model, **back)
    assert type(made) is kind
    after = made.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(made), out)
    assert receipt["preserves_the_function"]
    assert receipt["max_logit_difference"] < 1e-4
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], "mixtura" in config) == (base, False)
    assert receipt["model_type"] == base
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), out)


@pytest.mark.parametrize("base", ["llama", "opt", "gpt2"])
def test_some_layers_alone_leave_a_model_of_the_family(base, tmp_path):
    out = logits(pico(base))
    model = upcycle(pico(base), layers="all", copies=2, shards=2).model
    made, receipt = to_dense(model, layers=[0, 2], shards=2)
    assert made is model
    assert list(mixtures(made)) == ["1"]
    assert receipt["model_type"] == "mixtura"
    torch.testing.assert_close(logits(made), out, rtol=0, atol=1e-5)
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(made))
    assert list(mixtures(loaded)) == ["1"]
    assert type(to_dense(loaded, shards=2).model) is type(pico(base))


@pytest.mark.parametrize("options", [{}, {"gated": False, "activation": "gelu", "bias": True}], ids=["gated", "plain"])
@pytest.mark.parametrize("shared", [0, 16])
def test_one_expert_is_taken_exactly(options, shared):
    """Naive: the expert's own formula, and the shared expert's beside it."""
    made = mixture(shared=shared, **options)
    x = torch.randn(7, D)
    for e in range(4):
        alone = made.experts(x, torch.full((7, 1), e), torch.ones(7, 1))
        alone = alone if made.shared is None else alone + made.shared(x)
        dense = merged(0, made, e)
        assert dense.width == F + shared
        torch.testing.assert_close(dense(x), alone, rtol=1e-5, atol=1e-5)


def test_shares_weigh_the_experts():
    made = mixture(bias=True)
    dense = merged(0, made, [0, 6, 2, 0])
    one, two = view_expert(made.experts, 1), view_expert(made.experts, 2)
    for ours, a, b in zip(dense[:6], one, two, strict=True):
        torch.testing.assert_close(ours, 0.75 * a + 0.25 * b)
    mean = merged(0, made, "mean")
    torch.testing.assert_close(mean.up_FD, torch.stack([view_expert(made.experts, e).up_FD for e in range(4)]).mean(0))


def test_a_scale_of_the_router_goes_into_the_weights():
    made, x = mixture(), torch.randn(5, D)
    for parameter in made.experts.parameters():
        with torch.no_grad():
            parameter[:] = parameter[0].clone()
    made.router = TopKRouter(D, 4, 2, score="sigmoid", scale=2.5)
    torch.testing.assert_close(merged(0, made, "mean")(x), made(x), rtol=1e-4, atol=1e-4)


def test_weights_are_copies():
    made = mixture()
    dense = merged(0, made, 2)
    before = dense.up_FD.clone()
    with torch.no_grad():
        made.experts.gate_up_proj.zero_()
    assert torch.equal(dense.up_FD, before)
    assert not dense.up_FD.requires_grad


def test_what_differs_is_measured_and_not_promised():
    model = convert(pico("llama", initializer_range=0.2), {i: mixture() for i in range(3)})
    receipt = to_dense(model, experts={0: 3, 1: "mean", 2: [1, 0, 0, 0]}).receipt
    assert not receipt["preserves_the_function"]
    assert receipt["max_logit_difference"] > 1e-2
    assert receipt["options"]["experts"] == {"0": 3, "1": "mean", "2": [1.0, 0.0, 0.0, 0.0]}
    assert json.loads(json.dumps(receipt)) == receipt


def test_a_promise_is_only_made_where_it_holds():
    """Equal experts whose weights do not sum to 1, and shards that are read as whole experts."""
    equal = upcycle(pico("llama", initializer_range=0.2), layers="all", copies=4, shards=1).model
    for m in mixtures(equal).values():
        m.router = TopKRouter(D, 4, 2, renormalize=None)
    receipt = to_dense(equal).receipt
    assert not receipt["preserves_the_function"]
    assert receipt["max_logit_difference"] > 1e-2
    untied = upcycle(pico("llama", initializer_range=0.2), layers="all", copies=2, shards=2).model
    for m in mixtures(untied).values():
        with torch.no_grad():
            m.router.gate.weight.normal_()
    receipt = to_dense(untied, shards=2).receipt
    assert not receipt["preserves_the_function"]
    assert receipt["max_logit_difference"] > 1e-2


@pytest.mark.parametrize(
    ("base", "field", "options"),
    [
        ("llama", "intermediate_size", {}),
        ("opt", "ffn_dim", {"gated": False, "activation": "relu", "bias": True}),
        ("gpt2", "n_inner", {"gated": False, "activation": "gelu_new", "bias": True}),
    ],
)
def test_a_width_for_all_layers_becomes_that_of_the_family(base, field, options, tmp_path):
    model = convert(pico(base), {i: mixture(width=20, shared=4, **options) for i in range(3)})
    made, receipt = to_dense(model, experts=0)
    assert receipt["width"] == {"0": 24, "1": 24, "2": 24}
    assert getattr(made.config, field) == 24
    made.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(made))


@pytest.mark.parametrize(
    ("widths", "layers", "message"),
    [
        ({1: 20, 2: 20}, "all", "one width, here 48, as layer 0 has it; the dense layers would have 20"),
        ({0: 20, 1: 20, 2: 24}, "all", "one width, here 48; the dense layers would have 20, 24"),
        ({0: 20, 1: 20, 2: 20}, [0, 1], "one width, here 48, as layer 2 has it; the dense layers would have 20"),
    ],
)
def test_widths_that_the_base_cannot_have_are_refused(widths, layers, message):
    model = convert(pico("llama"), {i: mixture(width=width) for i, width in widths.items()})
    before = logits(model)
    with pytest.raises(NotExpressibleError, match=message):
        to_dense(model, layers=layers)
    assert torch.equal(logits(model), before)
    assert list(mixtures(model)) == [str(i) for i in widths]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": True}, "layer 1: the feed-forward of the base family has no gate_bias_F, the experts have one"),
        ({"gated": False}, "layer 1: the feed-forward of the base family is gated, the experts are not"),
        ({"activation": "gelu"}, "has activation silu, the experts have gelu"),
    ],
)
def test_forms_that_the_base_cannot_have_are_refused(options, message):
    model = convert(pico("llama"), {1: mixture(**options)})
    before = logits(model)
    with pytest.raises(NotExpressibleError, match=message):
        to_dense(model)
    assert torch.equal(logits(model), before)


def test_a_bias_that_is_0_or_missing_fits():
    model = convert(pico("gpt2", n_inner=F), {i: mixture(gated=False, activation="gelu_new") for i in range(3)})
    made = to_dense(model, experts=2).model
    assert not made.transformer.h[1].mlp.c_proj.bias.any()


def test_mode_and_type_are_kept():
    model = upcycle(pico("llama").to(torch.bfloat16), layers="all", copies=2, shards=1).model.train()
    made = to_dense(model).model
    assert made.training
    assert made.model.layers[1].mlp.training
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_a_broken_promise_is_an_error(monkeypatch):
    monkeypatch.setattr("mixtura.surgery.to_dense._preserves", lambda mixture, shards: True)
    model = convert(pico("llama", initializer_range=0.3), {1: mixture()})
    with pytest.raises(MixturaError, match="to-dense promised equal logits, but they differ"):
        to_dense(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4}, r"experts of layer 1 must be 'mean', a number in 0 \.\. 3, or 4 shares of at least 0, got 4"),
        ({"experts": -1}, "got -1"),
        ({"experts": "largest"}, "got 'largest'"),
        ({"experts": [1, 2]}, r"got \[1, 2\]"),
        ({"experts": [0, 0, 0, 0]}, "at least 0"),
        ({"experts": [-1, 1, 1, 1]}, "at least 0"),
        ({"experts": {2: 0}}, "experts of layer 1 must be .*, got None"),
        ({"experts": 2, "shards": 2}, r"a number in 0 \.\. 1, or 2 shares"),
        ({"shards": 3}, "shards must divide the 4 experts of layer 1, got 3"),
        ({"shards": 0}, "shards must be a whole number of at least 1, got 0"),
        ({"layers": [0]}, r"layers must be mixtures, which are \[1\], got 0"),
    ],
)
def test_wrong_options_are_named(options, message):
    model = convert(pico("llama"), {1: mixture()})
    with pytest.raises(OptionError, match=message):
        to_dense(model, **options)
    assert list(mixtures(model)) == ["1"]


def test_what_is_no_feed_forward_or_no_family_is_refused():
    group = Mixture(TopKRouter(D, 5, 2), ExpertGroup([Experts(4, D, F), ZeroExperts(1, D)]))
    with pytest.raises(NotExpressibleError, match="layer 1 has experts of several forms"):
        to_dense(convert(pico("llama"), {1: group}))
    zeros = Mixture(TopKRouter(D, 4, 2), ZeroExperts(4, D))
    with pytest.raises(NotExpressibleError, match="layer 1 has ZeroExperts"):
        to_dense(convert(pico("llama"), {1: zeros}))
    other = Mixture(TopKRouter(D, 4, 2), Experts(4, D, F), FeedForward(D, 8, activation="gelu"))
    with pytest.raises(NotExpressibleError, match="layer 1: the shared expert is of another form"):
        to_dense(convert(pico("llama"), {1: other}))
    with pytest.raises(NotExpressibleError, match="MixtralForCausalLM is no model of the family"):
        to_dense(pico("mixtral"))


def test_a_router_without_a_selection_promises_nothing():
    mixed = Mixture(registry.get("hash-routing")(D, 4, vocabulary=64), Experts(4, D, F))
    assert not to_dense(convert(pico("llama"), {1: mixed})).receipt["preserves_the_function"]
