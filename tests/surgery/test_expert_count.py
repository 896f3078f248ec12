"""One expert more, some fewer: what is promised holds, rows and stacks follow, and the rest is untouched."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from mixtura.core import NotExpressibleError, OptionError, registry
from mixtura.hf import convert, mixtures, record
from mixtura.hf.roles import freeze
from mixtura.nn import ExpertGroup, Experts, Mixture
from mixtura.nn.experts.forms import ConstantExperts, ZeroExperts
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.surgery.expert_count import NEVER, add_expert, remove_expert
from mixtura.surgery.upcycle import upcycle
from pico import pico, tokens

D = 32


def model_with(router, layers=(1, 2), experts=None, base="llama"):
    """A model whose mixtures have experts that all differ."""
    torch.manual_seed(3)
    made = {}
    for i in layers:
        stack = Experts(4, D, 8) if experts is None else experts()
        for parameter in stack.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        made[i] = Mixture(router(), stack)
    return convert(pico(base, initializer_range=0.2), made).eval()


def topk(k=2, **options):
    return lambda: TopKRouter(D, 4, k, **options)


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


SELECTIONS = {
    "mixtral": {"k": 2},
    "unnormalized": {"k": 2, "renormalize": None},
    "gpt-oss": {"k": 3, "order": "topk-score", "bias": True},
    "sigmoid": {"k": 2, "score": "sigmoid", "scale": 2.5},
    "relu": {"k": 2, "score": "relu", "renormalize": None},
    "switch": {"k": 1, "renormalize": None},
    "llama4": {"k": 1, "score": "sigmoid", "order": "topk-score", "weight_on": "input", "renormalize": None},
}


def chosen(model, layer="1"):
    """Experts that some token chooses."""
    with torch.no_grad(), record(model) as states:
        model(tokens())
    routing = next(item.routing for item in states[0].tape.records if item.layer == layer)
    return set(routing.indices_TK.flatten().tolist())


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("copy_of", [None, 1])
def test_an_expert_that_is_never_chosen_changes_nothing(selection, copy_of):
    model = model_with(topk(**SELECTIONS[selection]))
    before, used = logits(model), chosen(model)
    added, receipt = add_expert(model, copy_of=copy_of, noise=0.1, router="never")
    assert receipt["preserves_the_function"]
    assert receipt["max_logit_difference"] < 1e-5
    torch.testing.assert_close(logits(added), before, rtol=0, atol=1e-5)
    assert chosen(added) == used
    router = mixtures(added)["1"].router
    assert router.num_experts == 5
    assert router.gate.bias[4] == NEVER


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_never_holds_in_every_type(dtype):
    model = model_with(topk(renormalize=None)).to(dtype)
    used = chosen(model)
    added, receipt = add_expert(model, router="never")
    assert chosen(added) == used
    assert {p.dtype for p in added.parameters()} == {dtype}
    assert receipt["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "options",
    [{"score": "sigmoid", "renormalize": None}, {"score": "relu", "renormalize": None}, {"renormalize": 1.0}],
    ids=["sigmoid", "relu", "constant"],
)
@pytest.mark.filterwarnings("ignore:a top-1 gate")
def test_a_copy_of_a_top_1_expert_with_its_row_changes_nothing(options):
    """A token goes to one of the two, and they are equal."""
    model = model_with(topk(1, **options))
    before = logits(model)
    added, receipt = add_expert(model, copy_of=2)
    assert receipt["options"]["router"] == "copy"
    assert receipt["preserves_the_function"]
    torch.testing.assert_close(logits(added), before, rtol=0, atol=1e-5)
    assert not add_expert(added, copy_of=2, noise=0.1).receipt["preserves_the_function"]


@pytest.mark.parametrize("options", [{"k": 2}, {"k": 1, "renormalize": None}, {"k": 2, "score": "sigmoid"}])
def test_where_a_copy_changes_the_function_nothing_is_promised(options):
    """Two equal logits push out the k-th expert, and take their share of a softmax."""
    model = model_with(topk(**options))
    receipt = add_expert(model, copy_of=2).receipt
    assert not receipt["preserves_the_function"]
    assert receipt["max_logit_difference"] > 1e-3


def test_copies_of_equal_experts_keep_the_function_for_every_row():
    model = upcycle(pico("llama"), layers=[1], copies=3, shards=1, k=2).model
    receipt = add_expert(model, copy_of=0).receipt
    assert not receipt["preserves_the_function"]
    assert receipt["max_logit_difference"] < 1e-5


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_rows_and_stacks_follow_and_all_else_stays(noise):
    model = model_with(topk())
    before = state(model)
    added, receipt = add_expert(model, layers=[2], copy_of=1, noise=noise)
    after = state(added)
    assert list(before) == list(after)
    changed = {name for name in before if before[name].shape != after[name].shape}
    place = "model.layers.2.mlp.mixture."
    assert changed == {place + part for part in ("router.gate.weight", "experts.gate_up_proj", "experts.down_proj")}
    assert all(torch.equal(before[name], after[name]) for name in before if name not in changed)
    for name in changed:
        assert torch.equal(after[name][:4], before[name])
        difference = (after[name][4] - before[name][1]).std() / before[name][1].std()
        assert float(difference) == pytest.approx(0 if "router" in name else noise, abs=0.02)
    assert receipt["experts"] == {"2": {"before": 4, "after": 5}}
    assert receipt["layers"] == [2]
    grown = 3 * D * 8 + D
    assert receipt["parameters"]["after"] - receipt["parameters"]["before"] == grown
    assert json.loads(json.dumps(receipt)) == receipt


def test_a_drawn_expert_has_mean_and_deviation_of_its_stacks():
    model = model_with(topk(), experts=lambda: Experts(4, D, 64))
    with torch.no_grad():
        mixtures(model)["1"].experts.down_proj.add_(2)
    added = add_expert(model, seed=5).model
    experts = mixtures(added)["1"].experts
    for stack in (experts.gate_up_proj.detach(), experts.down_proj.detach()):
        assert float(stack[4].mean()) == pytest.approx(float(stack[:4].mean()), abs=0.05)
        assert float(stack[4].std()) == pytest.approx(float(stack[:4].std()), rel=0.1)
    rows = mixtures(added)["1"].router.gate.weight.detach()
    torch.testing.assert_close(rows[4], rows[:4].mean(0))


def test_what_is_drawn_comes_from_the_seed_alone():
    first = state(add_expert(model_with(topk()), seed=1).model)
    torch.manual_seed(77)
    model = model_with(topk())
    random = torch.get_rng_state()
    again = state(add_expert(model, seed=1).model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = state(add_expert(model_with(topk()), seed=2).model)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_given_rows_become_the_router():
    rows = {1: torch.randn(D), 2: torch.randn(D)}
    added, receipt = add_expert(model_with(topk(bias=True)), copy_of=0, router=rows)
    for i, row in rows.items():
        assert torch.equal(mixtures(added)[str(i)].router.gate.weight[4], row)
    assert receipt["options"]["router"] == "given"


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("aux-loss-free-bias", {"k": 2}),
        ("topk-softmax", {"k": 2, "noise": "learned", "bias": True}),
        ("dynamic-top-p", {"p": 0.6}),
        ("dynamic-top-p", {"p": 0.6, "max_k": 3}),
    ],
)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_adding_and_removing_again_is_the_identity_on_every_router(key, options, base, tmp_path):
    """Also of tensors that have no axis for experts, of biases of the selection, and of a second gate for noise."""
    model = model_with(lambda: registry.get(key)(D, 4, **options), base=base)
    for mixture in mixtures(model).values():
        for tensor in mixture.router.state_dict().values():
            tensor.normal_(std=0.5)
    before, out = state(model), logits(model)
    added = add_expert(model, copy_of=1, noise=0.2).model
    assert all(m.router.num_experts == m.experts.num_experts == 5 for m in mixtures(added).values())
    added.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(added))
    removed, receipt = remove_expert(added, 4)
    after = state(removed)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(removed), out)
    assert receipt["experts"] == {"1": {"before": 5, "after": 4}, "2": {"before": 5, "after": 4}}


def test_the_bias_of_a_selection_keeps_its_own_type():
    model = model_with(lambda: registry.get("aux-loss-free-bias")(D, 4, k=2)).to(torch.bfloat16)
    router = mixtures(add_expert(model, copy_of=0).model)["1"].router
    assert router.selection_bias.dtype == torch.float32
    assert router.selection_bias.shape == (5,)
    assert router.gate.weight.dtype == torch.bfloat16


def test_removed_experts_are_the_named_ones():
    model = model_with(topk())
    before = state(model)
    removed, receipt = remove_expert(model, [0, 2], layers=[1])
    assert not receipt["preserves_the_function"]
    for part in ("router.gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        name = f"model.layers.1.mlp.mixture.{part}"
        assert torch.equal(state(removed)[name], before[name][[1, 3]])
    assert mixtures(removed)["2"].experts.num_experts == 4


def test_what_is_never_chosen_leaves_without_a_trace():
    model = model_with(topk(bias=True))
    for mixture in mixtures(model).values():
        with torch.no_grad():
            mixture.router.gate.bias[3] = NEVER
    before = logits(model)
    removed, receipt = remove_expert(model, 3)
    assert receipt["share_of_slots"] == {"1": 0.0, "2": 0.0}
    torch.testing.assert_close(logits(removed), before, rtol=0, atol=1e-5)


def test_the_share_of_slots_is_that_of_the_tokens():
    """Naive: each layer's router on what enters it."""
    model, ids, seen = model_with(topk()), tokens(), {}
    for layer, mixture in mixtures(model).items():
        mixture.router.register_forward_hook(lambda m, args, out, layer=layer: seen.update({layer: out.indices_TK}))
    logits(model)
    seen = dict(seen)
    receipt = remove_expert(model, [1, 3], tokens_BQ=ids).receipt
    for layer, indices_TK in seen.items():
        slots = indices_TK.flatten().tolist()
        expected = sum(e in (1, 3) for e in slots) / len(slots)
        assert receipt["share_of_slots"][layer] == pytest.approx(expected)
        assert 0 < expected < 1


def test_layers_may_come_to_have_different_numbers(tmp_path):
    removed, receipt = remove_expert(model_with(topk()), {1: [0], 2: [1, 2]})
    assert receipt["experts"] == {"1": {"before": 4, "after": 3}, "2": {"before": 4, "after": 2}}
    removed.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(removed))
    assert [m.experts.num_experts for m in mixtures(loaded).values()] == [3, 2]


def group():
    return ExpertGroup([Experts(2, D, 8), ConstantExperts(2, D), ZeroExperts(1, D)])


def test_the_form_of_the_copy_grows_and_later_forms_move_on():
    model = model_with(lambda: TopKRouter(D, 5, 2, bias=True), experts=group)
    before, out = state(model), logits(model)
    added, receipt = add_expert(model, copy_of=3, router="never")
    torch.testing.assert_close(logits(added), out, rtol=0, atol=1e-5)
    assert receipt["preserves_the_function"]
    mixture = mixtures(added)["1"]
    assert [form.num_experts for form in mixture.experts.forms] == [2, 3, 1]
    rows = before["model.layers.1.mlp.mixture.router.gate.weight"]
    assert torch.equal(mixture.router.gate.weight[[0, 1, 2, 3, 5]], rows)
    assert torch.equal(mixture.experts.forms[1].vector[2], mixture.experts.forms[1].vector[1])


def test_a_form_without_experts_goes_and_one_form_is_no_group(tmp_path):
    model = model_with(lambda: TopKRouter(D, 5, 2), experts=group)
    removed, _ = remove_expert(model, [2, 3], layers=[1])
    assert [type(form) for form in mixtures(removed)["1"].experts.forms] == [Experts, ZeroExperts]
    removed, _ = remove_expert(removed, 2, layers=[1])
    assert type(mixtures(removed)["1"].experts) is Experts
    removed.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(removed))


def test_null_experts_stay_where_they_are():
    model = model_with(
        lambda: registry.get("adamoe")(D, 4, null_experts=2, k=3),
        experts=lambda: ExpertGroup([Experts(4, D, 8), ZeroExperts(2, D)]),
    )
    rows = mixtures(model)["1"].router.gate.weight.detach().clone()
    added = add_expert(model, copy_of=0).model
    router = mixtures(added)["1"].router
    assert (router.num_experts, router.spec.null_experts) == (7, 2)
    assert torch.equal(router.gate.weight[[0, 1, 2, 3, 5, 6]], rows)
    assert [form.num_experts for form in mixtures(added)["1"].experts.forms] == [5, 2]
    with pytest.raises(NotExpressibleError, match="experts from 5 on are the router's null experts"):
        remove_expert(added, 6)
    with pytest.raises(NotExpressibleError, match="experts from 5 on are the router's null experts"):
        add_expert(added, copy_of=5)


def test_mode_gradients_and_the_shared_expert_are_kept():
    model = upcycle(pico("llama"), layers=[1], copies=2, shards=2, shared=0.25).model.train()
    freeze(model, "routers")
    shared = mixtures(model)["1"].shared
    added = add_expert(model, copy_of=0).model
    assert added.training
    mixture = mixtures(added)["1"]
    assert mixture.shared is shared
    assert mixture.router.training
    assert mixture.experts.training
    assert not mixture.router.gate.weight.requires_grad
    assert mixture.experts.down_proj.requires_grad


def test_the_new_expert_is_trained():
    added = add_expert(model_with(topk()), copy_of=0, noise=0.01).model
    ids = tokens(rows=8)
    added(input_ids=ids, labels=ids).loss.backward()
    assert mixtures(added)["1"].experts.down_proj.grad[4].any()


def test_only_null_experts_and_rules_are_refused_by_name():
    hashed = model_with(lambda: registry.get("hash-routing")(D, 4, vocabulary=64))
    for change in (lambda: add_expert(hashed, copy_of=0), lambda: remove_expert(hashed, 0)):
        with pytest.raises(NotExpressibleError, match="layer 1: HashRouter has no logits"):
            change()
    residual = model_with(lambda: registry.get("gating-residual")(D, 4))
    with pytest.raises(
        NotExpressibleError, match=r"hidden\.weight of GatingResidualRouter has 32 entries for 4 experts"
    ):
        add_expert(residual, copy_of=0)
    with pytest.raises(NotExpressibleError, match="layer 1: DynamicTopPRouter has no bias of its logits"):
        add_expert(model_with(lambda: registry.get("dynamic-top-p")(D, 4)), router="never")
    with pytest.raises(NotExpressibleError, match="LlamaForCausalLM is no model of the family"):
        add_expert(pico("llama"))
    zeros = model_with(lambda: TopKRouter(D, 4), experts=lambda: ZeroExperts(4, D))
    with pytest.raises(NotExpressibleError, match="layer 1 has no feed-forward experts to draw one like"):
        add_expert(zeros)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: add_expert(m, copy_of=4), r"copy_of must be an expert of layer 1, 0 \.\. 3, got 4"),
        (lambda m: add_expert(m, copy_of=-1), r"copy_of must be an expert of layer 1, 0 \.\. 3, got -1"),
        (lambda m: add_expert(m, noise=-1), "noise must be a number of at least 0, got -1"),
        (lambda m: add_expert(m, noise=float("inf")), "noise must be a number of at least 0, got inf"),
        (lambda m: add_expert(m, router="copy"), "router 'copy' needs copy_of"),
        (lambda m: add_expert(m, router="zero"), "router must be 'never', 'copy', 'mean' or rows by layer, got 'zero'"),
        (lambda m: add_expert(m, router={1: torch.zeros(D)}), "a row of 32 for layer 2, got None"),
        (lambda m: add_expert(m, router={1: torch.zeros(3), 2: torch.zeros(D)}), r"for layer 1, got \(3,\)"),
        (lambda m: add_expert(m, layers=[0]), r"layers must be mixtures, which are \[1, 2\], got 0"),
        (lambda m: add_expert(m, layers="last:9"), "layers"),
        (lambda m: add_expert(m, seed=None), "seed must be a whole number"),
        (lambda m: remove_expert(m, 4), r"experts must be some of the 4 of layer 1, 0 \.\. 3, got 4"),
        (lambda m: remove_expert(m, []), r"experts must be some of the 4 of layer 1, 0 \.\. 3, got \[\]"),
        (lambda m: remove_expert(m, [True]), r"experts must be some of the 4 of layer 1"),
        (lambda m: remove_expert(m, {0: [1]}), r"layers must be mixtures, which are \[1, 2\], got 0"),
        (lambda m: remove_expert(m, [0, 1, 2]), "layer 1: 1 experts would remain, but a token chooses 2"),
        (lambda m: remove_expert(m, 0, tokens_BQ=torch.zeros(3)), "token ids"),
    ],
)
def test_wrong_options_are_named_and_leave_the_model_alone(change, message):
    model = model_with(topk())
    before = logits(model)
    with pytest.raises(OptionError, match=message):
        change(model)
    assert torch.equal(logits(model), before)


def test_the_list_of_methods_needs_no_transformers():
    """Surgeries lie in a folder that the registry imports whole."""
    code = "import sys; from mixtura.core import registry; registry.methods(); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_frozen_experts_are_not_let_go_in_silence():
    model = model_with(topk())
    freeze(model, "experts[0]")
    with pytest.raises(OptionError, match=r"some experts of gate_up_proj are frozen"):
        add_expert(model, copy_of=1)
