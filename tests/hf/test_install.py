"""Installing: options, start, receipt, what the family keeps, and everything that is refused."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from mixtura.core import FileFormatError, MixturaWarning, NotExpressibleError, OptionError, UnknownNameError
from mixtura.hf import convert, mixtures, record
from mixtura.hf.count import count_parameters
from mixtura.hf.export import check_export
from mixtura.hf.install import install
from mixtura.hf.modeling import routers
from mixtura.hf.native import expert_blocks, native_mixtures
from mixtura.hf.seat import seats
from mixtura.nn import Experts, LinearGate, Mixture
from mixtura.nn.routers.base import Router
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico
from pico_native import logits, native, reloaded, tokens

FILE = "model.safetensors"


def gate_weights(model):
    return {layer: router.gate.weight for layer, router in routers(model).items()}


def test_a_receipt_says_what_changed():
    model = native("olmoe")
    parameters = sum(p.numel() for p in model.parameters())
    made, receipt = install(model, "adamoe", null_experts=2, k=3)
    assert receipt.pop("versions")["mixtura"]
    assert receipt.pop("max_logit_difference") > 0.01
    assert receipt == {
        "router": ["adamoe"],
        "options": {"null_experts": 2, "k": 3},
        "layers": ["0", "1"],
        "start": "native",
        "allow": [],
        "bit_equal": False,
        "dtype": "float32",
        "tokens_checked": 128,
        "parameters": {"before": parameters, "after": parameters + 2 * 2 * 32},
    }
    json.dumps(receipt)
    assert made.config.mixtura["routers"]["1"] == {
        "method": "adamoe",
        "num_experts": 4,
        "dim": 32,
        "null_experts": 2,
        "k": 3,
    }


def test_other_weights_are_shared_not_copied():
    model = native("mixtral")
    experts = model.model.layers[0].mlp.experts.down_proj
    made, _ = install(model, "topk-softmax")
    assert made.model.layers[0].mlp.experts.down_proj is experts


@pytest.mark.parametrize(
    ("layers", "chosen"), [("all", ["0", "1"]), ("last:1", ["1"]), ([0], ["0"]), ("0,1", ["0", "1"])]
)
def test_layers_can_be_chosen_and_the_others_decide_by_themselves(layers, chosen):
    model, x = native("qwen3_moe"), tokens()
    made, receipt = install(model, "topk-softmax", layers=layers, start="random")
    assert receipt["layers"] == chosen == list(routers(made))
    assert sorted([*native_mixtures(made), *chosen]) == ["0", "1"]
    assert list(expert_blocks(made)) == ["0", "1"]
    with record(made) as states:
        logits(made, x)
    assert [layer for layer, _ in states[0].tape.records] == ["0", "1"]


def test_start_native_takes_rows_and_the_selection_of_the_family():
    model = native("deepseek_v3")
    rows = {str(i): layer.mlp.gate.weight.clone() for i, layer in enumerate(model.model.layers)}
    biases = [layer.mlp.gate.e_score_correction_bias.clone() for layer in model.model.layers]
    made, receipt = install(model, "aux-loss-free-bias")
    assert {"score": "sigmoid", "scale": 2.5, "groups": 2, "k": 2}.items() <= receipt["options"].items()
    assert all(torch.equal(weight, rows[layer]) for layer, weight in gate_weights(made).items())
    assert all(torch.equal(r.selection_bias, b) for r, b in zip(routers(made).values(), biases, strict=True))


def test_start_random_takes_the_options_of_the_method():
    model = native("deepseek_v3")
    rows = model.model.layers[0].mlp.gate.weight.clone()
    made, receipt = install(model, "aux-loss-free-bias", start="random", rate=0.5)
    assert {"groups": 1, "scale": 1.0, "rate": 0.5}.items() <= receipt["options"].items()
    assert not torch.equal(gate_weights(made)["0"], rows)
    assert not routers(made)["0"].selection_bias.any()


def test_options_that_are_given_win():
    _, receipt = install(native("olmoe"), "topk-softmax", k=3, renormalize=2.0)
    assert {"k": 3, "renormalize": 2.0, "score": "softmax"}.items() <= receipt["options"].items()


def test_null_experts_have_rows_of_their_own():
    model = native("olmoe")
    rows = model.model.layers[0].mlp.gate.weight.clone()
    made, _ = install(model, "adamoe", null_experts=2)
    weight = gate_weights(made)["0"]
    assert torch.equal(weight[:4], rows)
    assert weight[4:].any(1).all()


def test_a_bias_of_the_gate_needs_a_gate_with_bias():
    with pytest.raises(OptionError, match="start must be 'random', or the gate have a bias"):
        install(native("gpt_oss"), "topk-softmax")
    model = native("gpt_oss")
    torch.nn.init.normal_(model.model.layers[0].mlp.router.bias)
    bias = model.model.layers[0].mlp.router.bias.clone()
    made, _ = install(model, "topk-softmax", bias=True)
    assert torch.equal(routers(made)["0"].gate.bias, bias)


def test_a_bias_of_the_selection_that_is_lost_is_warned_of():
    with pytest.warns(MixturaWarning, match="selection of layer 0 has a bias, router topk-softmax has none"):
        install(native("glm4_moe"), "topk-softmax", layers=[0])


@pytest.mark.parametrize(
    ("model_type", "attribute"), [("minimax_m2", "e_score_correction_bias"), ("afmoe", "expert_bias")]
)
def test_a_bias_of_the_selection_in_the_block_goes_with_its_router(model_type, attribute):
    model = native(model_type)
    block = next(iter(expert_blocks(model).values())).block
    bias = getattr(block, attribute).clone()
    made, _ = install(model, "aux-loss-free-bias")
    assert torch.equal(routers(made)["0"].selection_bias, bias)
    assert getattr(block, attribute) is None
    assert not [name for name in made.state_dict() if name.endswith(attribute)]


def test_a_router_without_parameters_has_nothing_to_start_from():
    made, receipt = install(native("mixtral"), "hash-routing")
    assert receipt["options"]["vocabulary"] == 64
    assert receipt["parameters"]["after"] == receipt["parameters"]["before"] - 2 * 4 * 32
    x = tokens()
    with record(made) as states:
        logits(made, x)
    assert torch.equal(states[0].tape.records[0].routing.indices_TK, routers(made)["0"].table[x.reshape(-1)])


def test_a_function_makes_a_router_for_each_layer():
    made, receipt = install(
        native("mixtral"), lambda layer, dim, E: TopKRouter(dim, E, 1 + int(layer), renormalize=None), start="random"
    )
    assert [router.slots for router in routers(made).values()] == [1, 2]
    assert receipt["router"] == ["topk-softmax"]


def test_another_router_can_take_the_seat():
    first, _ = install(native("olmoe"), "topk-softmax")
    rows = {layer: weight.clone() for layer, weight in gate_weights(first).items()}
    made, _ = install(first, "dynamic-top-p", p=0.5)
    assert [spec["method"] for spec in made.config.mixtura["routers"].values()] == ["dynamic-top-p"] * 2
    assert all(torch.equal(weight, rows[layer]) for layer, weight in gate_weights(made).items())
    with record(made) as states:
        logits(made, tokens())
    assert len(states[0].tape.records) == 2


def test_a_model_that_was_listened_to_decides_once():
    model = native("olmoe")
    with record(model):
        logits(model, tokens())
    made, _ = install(model, "topk-softmax")
    with record(made) as states:
        logits(made, tokens())
    assert [layer for layer, _ in states[0].tape.records] == ["0", "1"]


def test_mixtures_and_routers_live_in_one_model(tmp_path):
    made, _ = install(native("qwen3_moe"), "adamoe", null_experts=2)
    mixture = Mixture(TopKRouter(32, 3), Experts(3, 32, 8))
    both = convert(made, {1: mixture})
    assert sorted(routers(both)) == ["0", "1"]
    assert list(seats(both)) == ["0"]
    assert list(mixtures(both)) == ["1"]
    assert list(both.config.mixtura["routers"]) == ["0"]
    loaded, x = reloaded(both, tmp_path), tokens()
    assert torch.equal(logits(loaded, x), logits(both, x))
    assert check_export(both)["qwen3_moe"] == "routers of ours in native mixtures"


def test_own_bias_of_the_selection_survives_in_float32(tmp_path):
    made, _ = install(native("mixtral").bfloat16(), "aux-loss-free-bias")
    for router in routers(made).values():
        router.end_step(torch.tensor([5, 0, 3, 3]))
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer, router in routers(loaded).items():
        assert router.selection_bias.dtype == torch.float32
        assert router.gate.weight.dtype == torch.bfloat16
        assert torch.equal(router.selection_bias, routers(made)[layer].selection_bias)
        assert router.selection_bias.any()


def test_a_base_model_without_head_loads(tmp_path):
    made, _ = install(native("mixtral"), "adamoe", null_experts=1)
    made.save_pretrained(tmp_path)
    headless = AutoModel.from_pretrained(tmp_path)
    for parameter in headless.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        expected, seen = (model(tokens()).last_hidden_state for model in (made.model, headless))
    assert torch.equal(seen, expected)


def test_deepcopy_is_independent():
    made, _ = install(native("mixtral"), "topk-softmax")
    twin, x = copy.deepcopy(made), tokens()
    torch.nn.init.zeros_(routers(twin)["0"].gate.weight)
    assert not torch.equal(logits(twin, x), logits(made, x))
    assert gate_weights(made)["0"].any()


@pytest.mark.parametrize("model_type", ["phimoe", "inkling2_text"])
def test_names_of_ours_are_out_of_reach_for_the_renamings_of_a_base(model_type, tmp_path):
    """Their mappings rename every gate.weight or gate.bias."""
    made = convert(native(model_type), {0: Mixture(TopKRouter(32, 3, bias=True), Experts(3, 32, 8))})
    torch.nn.init.normal_(mixtures(made)["0"].router.gate.bias)
    loaded, x = reloaded(made, tmp_path), tokens()
    assert torch.equal(logits(loaded, x), logits(made, x))
    assert any(name.endswith("mixture.router.gate.bias") for name in load_file(tmp_path / FILE))


def test_a_block_that_needs_token_ids_is_no_place_for_a_mixture():
    with pytest.raises(NotExpressibleError, match=r"layer 0: mlp .* cannot be called with hidden states alone"):
        convert(native("deepseek_v4"), {0: Mixture(TopKRouter(32, 3), Experts(3, 32, 8))})


def test_active_parameters_follow_the_router():
    before = count_parameters(native("mixtral"))
    one = count_parameters(install(native("mixtral"), "topk-softmax", k=1, renormalize=None).model)
    all_of_them = count_parameters(install(native("mixtral"), "dynamic-top-p").model)
    expert = 3 * 32 * 48
    assert before.active - one.active == 2 * expert
    assert all_of_them.active == all_of_them.total


def leaking(**options):
    return install(native("mixtral"), "expert-choice", **options)


def test_a_router_that_reads_later_tokens_is_refused_unless_allowed_by_name(tmp_path):
    with pytest.raises(NotExpressibleError, match=r"expert-choice reads later tokens.*allow=\['expert-choice'\]"):
        leaking()
    with pytest.raises(NotExpressibleError, match="reads later tokens"):
        leaking(allow=["topk-softmax"])
    made, receipt = leaking(allow=["expert-choice"])
    assert receipt["allow"] == ["expert-choice"]
    loaded, x = reloaded(made, tmp_path), tokens()
    assert torch.equal(logits(loaded, x), logits(made, x))
    again = convert(loaded, {0: Mixture(TopKRouter(32, 3), Experts(3, 32, 8))})
    assert again.config.mixtura["allow"] == ["expert-choice"]


def test_a_leak_is_found_by_trying_not_by_its_declaration():
    class Leaking(TopKRouter):
        def forward(self, hidden_TD):
            return super().forward(hidden_TD - hidden_TD.mean(0))

    made = Leaking(32, 4)
    made.method_config = {"method": "topk-softmax", "dim": 32, "num_experts": 4}
    with pytest.raises(NotExpressibleError, match="topk-softmax reads later tokens"):
        convert(pico("llama"), {0: Mixture(made, Experts(4, 32, 8))})


def test_an_allowance_that_was_taken_out_of_the_file_is_missed(tmp_path):
    leaking(allow=["expert-choice"]).model.save_pretrained(tmp_path)
    change_config(tmp_path, allow=[])
    with pytest.raises(NotExpressibleError, match="expert-choice reads later tokens"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def change_config(folder, **ours):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["mixtura"] |= ours
    file.write_text(json.dumps(config))


class Unregistered(Router):
    """No method."""


def unregistered(layer, dim, num_experts):
    return Unregistered(LinearGate(dim, num_experts), TopKRouter(dim, num_experts).spec, num_experts)


@pytest.mark.parametrize(
    ("router", "options", "error", "message"),
    [
        ("topk-sofmax", {}, UnknownNameError, "unknown router 'topk-sofmax'; did you mean 'topk-softmax'"),
        ("sparse-upcycling", {}, UnknownNameError, "unknown router 'sparse-upcycling'"),
        ("topk-softmax", {"kk": 2}, OptionError, "did you mean 'k'"),
        ("topk-softmax", {"k": 9}, OptionError, "k must be at most"),
        ("topk-softmax", {"start": "old"}, OptionError, "start must be one of 'native', 'random', got 'old'"),
        ("topk-softmax", {"layers": [5]}, OptionError, r"layers must name some of 0 \.\. 1"),
        ("topk-softmax", {"weight_on": "input"}, NotExpressibleError, "weighs the inputs of experts"),
        ("gating-residual", {}, OptionError, "start must be 'random': router gating-residual has no linear gate"),
        (unregistered, {}, OptionError, "Unregistered has no configuration"),
        (unregistered, {"k": 2}, OptionError, r"got a function and \['k'\]"),
        (lambda layer, dim, E: TopKRouter(dim, E + 2), {}, NotExpressibleError, "6 experts, 0 of which answer 0"),
        (lambda layer, dim, E: TopKRouter(dim, E - 1), {}, OptionError, "start must be 'random'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_installed_is_refused_and_the_model_is_left_alone(router, options, error, message):
    model, x = native("mixtral"), tokens()
    before, names = logits(model, x), list(model.state_dict())
    with pytest.raises(error, match=message):
        install(model, router, **options)
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model, x), before)


def test_a_dense_model_and_dense_layers_have_nothing_to_route_to():
    with pytest.raises(NotExpressibleError, match="llama has no experts that transformers decorates"):
        install(pico("llama"), "topk-softmax")
    with pytest.raises(OptionError, match=r"layers must have native mixtures, as 1 have; got \[0\]"):
        install(native("hy_v3", mlp_layer_types=["dense", "sparse"]), "topk-softmax", layers=[0, 1])


def test_a_native_gate_that_is_not_linear_cannot_be_started_from():
    with pytest.raises(OptionError, match="Gemma4TextRouter of layer 0 is no linear gate"):
        install(native("gemma4_text"), "topk-softmax")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights, name: weights.pop(name), "missing tensors: .*mlp.gate.router.gate.weight"),
        (lambda weights, name: weights.update({f"{name}_more": weights[name].clone()}), "unexpected tensors"),
        (lambda weights, name: weights.update({name: weights[name][:2].clone()}), "mismatched tensors"),
    ],
    ids=["missing", "unexpected", "mismatched"],
)
def test_tensors_of_a_router_must_be_whole(edit, message, tmp_path):
    install(native("qwen3_moe"), "topk-softmax").model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    edit(weights, "model.layers.1.mlp.gate.router.gate.weight")
    save_file(weights, tmp_path / FILE, {"format": "pt"})
    with pytest.raises(FileFormatError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_router_for_a_layer_without_native_mixture_is_refused(tmp_path):
    install(native("mixtral"), "topk-softmax").model.save_pretrained(tmp_path)
    spec = {"method": "topk-softmax", "dim": 32, "num_experts": 4}
    change_config(tmp_path, routers={"7": spec})
    with pytest.raises(OptionError, match=r"routers must lie in layers with native mixtures \(0, 1\), got '7'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_files_of_version_1_are_read(tmp_path):
    made = convert(pico("llama"), {0: Mixture(TopKRouter(32, 4), Experts(4, 32, 8))})
    assert made.config.mixtura["version"] == 2
    made.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["mixtura"] = {"version": 1, "layers": config["mixtura"]["layers"]}
    file.write_text(json.dumps(config))
    loaded, x = AutoModelForCausalLM.from_pretrained(tmp_path), tokens()
    torch.testing.assert_close(logits(loaded, x), logits(made, x))
    assert convert(loaded, {1: Mixture(TopKRouter(32, 4), Experts(4, 32, 8))}).config.mixtura["version"] == 2


def test_output_router_logits_is_one_clear_error():
    made, _ = install(native("mixtral"), "topk-softmax")
    with pytest.raises(OptionError, match="output_router_logits must be False"):
        made(tokens(), output_router_logits=True)
    made.config.output_router_logits = True
    with pytest.raises(OptionError, match="output_router_logits must be False"):
        made(tokens())
    made(tokens(), output_router_logits=False)
    asking, x = native("mixtral"), tokens()
    asking.config.output_router_logits = True
    with pytest.raises(OptionError, match="output_router_logits must be False"):
        install(asking, "topk-softmax")
    assert logits(asking, x).isfinite().all()


def test_no_warning_comes_again_when_a_model_is_loaded(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, _ = install(native("mixtral"), "topk-softmax", k=1)
    made.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
