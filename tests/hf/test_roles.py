"""Roles by structure, and freezing by role: what is frozen stays bit-equal under any optimizer, the rest moves."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mixtura.core.errors import NotExpressibleError, OptionError, UnknownNameError
from mixtura.core.roles import ROLES, parse
from mixtura.hf import convert, mixtures
from mixtura.hf.frozen_rows import frozen_rows
from mixtura.hf.roles import freeze, unfreeze
from mixtura.hf.tensor_roles import buffer_roles, parameter_roles
from mixtura.nn import ExpertGroup, Experts, Mixture
from mixtura.nn.experts.forms import ConstantExperts, ZeroExperts
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.surgery.upcycle import upcycle
from pico import DENSE, SPARSE, pico, tokens

OURS = "model.layers.{}.mlp.mixture."


def ours(layers=(1, 2), **options):
    """A llama whose last layers have 4 experts and a shared one."""
    return upcycle(pico("llama"), layers=list(layers), copies=2, shards=2, shared=0.25, **options).model


def by_role(model):
    found = {role: set() for role in ROLES}
    for role in parameter_roles(model):
        found[role.role].add(role.name)
    return found


def train(model, optimizer, steps=3, accumulation=2):
    for step in range(steps):
        for part in range(accumulation):
            ids = tokens(seed=10 * step + part)
            model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def state(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_our_mixtures_have_their_roles():
    found = by_role(ours())
    assert found["routers"] == {f"{OURS.format(i)}router.gate.weight" for i in (1, 2)}
    assert found["experts"] == {f"{OURS.format(i)}experts.{p}_proj" for i in (1, 2) for p in ("gate_up", "down")}
    assert found["shared"] == {
        f"{OURS.format(i)}shared.{p}_proj.weight" for i in (1, 2) for p in ("gate", "up", "down")
    }
    assert found["feed-forward"] == {f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert found["embeddings"] == {"model.embed_tokens.weight"}
    assert found["head"] == {"lm_head.weight"}
    assert len(found["attention"]) == 3 * 4
    assert len(found["norms"]) == 3 * 2 + 1
    assert not found["other"]


@pytest.mark.parametrize("base", DENSE)
def test_every_parameter_of_a_dense_family_has_a_place(base):
    model = pico(base)
    found = by_role(model)
    feed_forward = {name for name in state(model) if any(part in name for part in (".mlp.", ".fc1.", ".fc2."))}
    assert found["feed-forward"] == feed_forward
    assert found["attention"] == {n for n in state(model) if "attn" in n or "attention" in n} - found["norms"]
    assert not found["other"] | found["experts"] | found["routers"] | found["shared"]


NATIVE = {
    "mixtral": (SPARSE["mixtral"], "gate.weight", ()),
    "olmoe": (SPARSE["olmoe"], "gate.weight", ()),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}, "router.weight router.bias", ()),
    "qwen2_moe": (
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "gate.weight",
        ("shared_expert.down_proj.weight", "shared_expert_gate.weight"),
    ),
    "llama4_text": ({"num_local_experts": 4, "head_dim": 8}, "router.weight", ("shared_expert.up_proj.weight",)),
}


@pytest.mark.parametrize("family", NATIVE)
def test_native_mixtures_have_their_roles(family):
    options, routers, shared = NATIVE[family]
    model = pico(family, **options)
    place = "model.layers.1.feed_forward." if family == "llama4_text" else "model.layers.1.mlp."
    found = {role.name: role for role in parameter_roles(model)}
    for name in routers.split():
        assert found[place + name].role == "routers"
    for name in shared:
        assert found[place + name].role == "shared"
    for name, role in found.items():
        assert (role.role == "experts") == (".experts." in name)
        if ".experts." in name:
            assert (role.experts, role.num_experts, role.layer) == (range(4), 4, int(name.split(".")[2]))


def test_the_bias_of_a_selection_is_the_routers():
    model = pico("minimax_m2", num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    roles = {role.name.rpartition(".")[2]: role.role for role in buffer_roles(model)}
    assert roles == {"e_score_correction_bias": "routers"}


def test_forms_of_a_group_have_their_own_numbers():
    group = ExpertGroup([Experts(2, 32, 8), ZeroExperts(1, 32), ConstantExperts(3, 32)])
    model = convert(pico("llama"), {0: Mixture(TopKRouter(32, 6), group)})
    numbers = {role.name.split("forms.")[1]: role.experts for role in parameter_roles(model) if role.role == "experts"}
    assert numbers == {
        "0.gate_up_proj": range(2),
        "0.down_proj": range(2),
        "2.vector": range(3, 6),
        "2.mixer": range(3, 6),
    }
    assert [name.split("forms.")[1] for name in freeze(model, "experts[3:5]")] == ["2.vector", "2.mixer"]
    assert frozen_rows(mixtures(model)["0"].experts.forms[2], "vector") == (0, 1)
    with pytest.raises(OptionError, match=r"'experts\[2\]' names no parameter"):  # the zero expert
        freeze(model, "experts[2]")
    with pytest.raises(OptionError, match=r"experts of layer 0 are 0 \.\. 5"):
        freeze(model, "experts[6]")


@pytest.mark.parametrize(
    ("what", "frozen"),
    [
        ("routers", {"router.gate.weight"}),
        ("experts", {"experts.gate_up_proj", "experts.down_proj"}),
        ("shared", {"shared.gate_proj.weight", "shared.up_proj.weight", "shared.down_proj.weight"}),
    ],
)
def test_freezing_names_what_changed_and_is_undone(what, frozen):
    model = ours()
    names = {OURS.format(i) + part for i in (1, 2) for part in frozen}
    assert set(freeze(model, what)) == names
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == names
    assert freeze(model, what) == []
    assert set(unfreeze(model, what)) == names
    assert all(p.requires_grad for p in model.parameters())


def test_all_but_one_thing():
    model = ours()
    everything = freeze(model, "all")
    assert len(everything) == len(list(model.parameters()))
    assert unfreeze(model, ["layers[2].routers", "layers[0].norms"]) == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        f"{OURS.format(2)}router.gate.weight",
    ]


@pytest.mark.parametrize(
    ("what", "layers"), [("layers[1:3]", {1, 2}), ("layers[-1]", {2}), ("layers[:2]", {0, 1}), ("layers", {0, 1, 2})]
)
def test_layers_are_whole_decoder_layers(what, layers):
    model = ours()
    frozen = set(freeze(model, what))
    assert frozen == {n for n in state(model) if n.startswith("model.layers.") and int(n.split(".")[2]) in layers}


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, foreach=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", ["ours", "mixtral"])
def test_frozen_experts_stay_bit_equal_and_all_else_moves(family, optimizer):
    """Weight decay moves a parameter without any gradient, and momentum one that had it before."""
    model = ours() if family == "ours" else pico("mixtral", **SPARSE["mixtral"])
    stepper = OPTIMIZERS[optimizer](model.parameters())
    train(model, stepper, steps=1)
    changed = freeze(model, "layers[1:].experts[1:3]")
    assert all(".experts." in name and len(p) == 4 for name, p in model.named_parameters() if name in changed)
    assert len(changed) == 4
    before = state(model)
    train(model, stepper)
    after = state(model)
    assert moved(before, after) == set(before)
    for name in changed:
        assert torch.equal(before[name][1:3], after[name][1:3])
        assert not torch.equal(before[name][0], after[name][0])
        assert not torch.equal(before[name][3], after[name][3])

    assert set(unfreeze(model, "experts[2]")) == set(changed)
    train(model, stepper)
    for name in changed:
        assert torch.equal(before[name][1], dict(model.named_parameters())[name][1])
        assert not torch.equal(before[name][2], dict(model.named_parameters())[name][2])


def test_what_is_frozen_whole_has_no_gradient_left_and_does_not_move():
    model = ours()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, steps=1)
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    names = freeze(model, ["routers", "experts"])
    before = state(model)
    optimizer.step()
    assert moved(before, state(model)) == set(before) - set(names)


def test_frozen_rows_count_nothing_in_the_norm_of_the_gradient():
    model = ours()
    freeze(model, ["all"])
    unfreeze(model, "layers[1].experts[0]")
    experts = mixtures(model)["1"].experts
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    assert experts.gate_up_proj.grad[0].any()
    assert not experts.gate_up_proj.grad[1:].any()


def test_a_gradient_from_before_is_taken_from_frozen_rows():
    model = ours()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    freeze(model, "layers[2].experts[0:2]")
    gradient = mixtures(model)["2"].experts.down_proj.grad
    assert not gradient[:2].any()
    assert gradient[2:].any()


def test_rows_written_between_two_steps_are_kept():
    """Loading a checkpoint after freezing is no move of an optimizer."""
    model = ours()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    freeze(model, "experts[0]")
    train(model, optimizer, steps=1)
    stack = mixtures(model)["1"].experts.down_proj
    with torch.no_grad():
        stack[0] = 0.25
    train(model, optimizer, steps=1)
    assert (stack[0] == 0.25).all()


def test_a_wholly_frozen_stack_can_be_let_go_expert_by_expert():
    model = ours()
    freeze(model, "experts")
    unfreeze(model, "layers[1].experts[3]")
    experts = mixtures(model)["1"].experts
    assert experts.down_proj.requires_grad
    assert frozen_rows(experts, "down_proj") == (0, 1, 2)
    freeze(model, "experts[3]")
    assert not experts.down_proj.requires_grad
    assert frozen_rows(experts, "down_proj") == ()


def test_nothing_is_saved_of_it(tmp_path):
    model = ours()
    keys = set(model.state_dict())
    freeze(model, ["experts[0:2]", "routers"])
    assert set(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(p.requires_grad for p in loaded.parameters())
    assert frozen_rows(mixtures(loaded)["1"].experts, "down_proj") == ()


def test_a_deep_copy_holds_its_own_rows():
    model = ours()
    freeze(model, "experts[0]")
    other = copy.deepcopy(model)
    unfreeze(model, "experts[0]")
    before = state(other)
    train(other, OPTIMIZERS["adamw"](other.parameters()))
    after = state(other)
    for part in ("gate_up_proj", "down_proj"):
        name = f"{OURS.format(1)}experts.{part}"
        assert torch.equal(before[name][0], after[name][0])
        assert not torch.equal(before[name][1], after[name][1])
    first = state(model)
    train(model, OPTIMIZERS["adamw"](model.parameters()))
    assert not torch.equal(first[name][0], state(model)[name][0])


def test_holding_rows_keeps_no_model_alive():
    model = ours()
    freeze(model, "experts[0]")
    stack = weakref.ref(mixtures(model)["1"].experts.down_proj)
    del model
    gc.collect()
    assert stack() is None


def test_another_model_is_not_touched():
    one, other = ours(), ours()
    freeze(one, "experts[0]")
    before = state(other)
    train(other, OPTIMIZERS["adamw"](other.parameters()))
    name = f"{OURS.format(1)}experts.down_proj"
    assert not torch.equal(before[name][0], state(other)[name][0])


def test_under_peft_adapters_have_the_role_of_their_place():
    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.mixture.experts.down_proj"],
        modules_to_save=["router.gate"],
    )
    model = get_peft_model(ours(), config)
    roles = {role.name: role for role in parameter_roles(model)}
    lora = [role for name, role in roles.items() if "lora" in name]
    assert {role.role for role in lora} == {"attention", "experts"}
    assert all(role.adapter and role.experts is None for role in lora)
    saved = [role for name, role in roles.items() if "modules_to_save.default" in name]
    assert [role.role for role in saved] == ["routers"] * 2
    stack = roles["base_model.model.model.layers.1.mlp.mixture.experts.base_layer.down_proj"]
    assert (stack.role, stack.experts, stack.layer, stack.adapter) == ("experts", range(4), 1, False)

    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(freeze(model, "adapters")) == trained
    assert set(unfreeze(model, "layers[1].adapters")) == {name for name in trained if ".layers.1." in name}
    with pytest.raises(NotExpressibleError, match=r"experts of layer 1 share the adapter .*lora_A"):
        freeze(model, "experts[0]")


def test_native_mixtures_are_found_under_peft():
    model = get_peft_model(pico("mixtral"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert sum(role.role == "routers" for role in parameter_roles(model)) == 3
    unfreeze(model, "layers[0].experts[1:3]")
    experts = model.get_base_model().model.layers[0].mlp.experts
    assert frozen_rows(experts, "gate_up_proj") == (0, 3)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("router", UnknownNameError, "unknown role 'router'; did you mean 'routers'"),
        ("layer[1]", UnknownNameError, "did you mean 'layers'"),
        ("experts[4]", OptionError, r"'experts\[4\]' is out of range: the experts of layer 1 are 0 \.\. 3"),
        ("experts[2:6]", OptionError, r"'experts\[2:6\]' is out of range: the experts of layer 1 are 0 \.\. 3"),
        ("experts[2:2]", OptionError, "out of range"),
        ("layers[3]", OptionError, r"the layers are 0 \.\. 2"),
        ("layers[-4:]", OptionError, r"the layers are 0 \.\. 2"),
        ("layers[0].experts", OptionError, "names no parameter; there are attention, feed-forward, norms"),
        ("layers[1].head", OptionError, "names no parameter"),
        ("adapters", OptionError, "names no parameter"),
        ("routers[1]", OptionError, "only layers and experts have numbers"),
        ("experts[1].layers[0]", OptionError, "two parts are"),
        ("layers[0].layers[1]", OptionError, "two parts are"),
        ("experts[]", OptionError, "a role is written as"),
        ("experts[0:4:2]", OptionError, "a role is written as"),
        ("", OptionError, "a role is written as"),
        (3, OptionError, "a role is written as"),
    ],
)
def test_wrong_expressions_are_named_and_change_nothing(what, error, message):
    model = ours()
    with pytest.raises(error, match=message) as caught:
        freeze(model, ["routers", what])
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())


def test_a_tied_head_is_said_to_be_tied():
    with pytest.raises(OptionError, match="a head that is tied is among the embeddings"):
        freeze(pico("gemma"), "head")


def test_quantized_weights_cannot_be_unfrozen():
    model = pico("llama")
    place = model.model.layers[0].self_attn.q_proj
    place.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(OptionError, match=r"q_proj\.weight is of torch\.int8: quantized"):
        unfreeze(model, "attention")


def test_experts_that_are_not_stacked_one_by_one_are_refused():
    model = ours()
    experts = mixtures(model)["1"].experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.detach().flatten(0, 1))
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().flatten(0, 1))
    with pytest.raises(NotExpressibleError, match="experts of layer 1 are not stacked expert by expert"):
        freeze(model, "experts[0]")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("all", (("all", None),)),
        ("experts[-1]", (("experts", -1),)),
        ("layers[2:].experts[:4]", (("layers", slice(2, None)), ("experts", slice(None, 4)))),
    ],
)
def test_expressions_are_parsed(text, parts):
    assert parse(text) == parts
