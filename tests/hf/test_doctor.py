"""Doctor: every lie that a model can tell about its tensors is found by name, and the model stays as it was."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from mixtura.core.errors import FileFormatError, MixturaWarning, NotExpressibleError, UnknownNameError
from mixtura.hf import convert, mixtures
from mixtura.hf.doctor import doctor, examine
from mixtura.hf.doctor_findings import ranges
from mixtura.hf.doctor_text import WIDTH, report_text
from mixtura.hf.roles import freeze
from mixtura.hf.stored import compare_with_files
from mixtura.nn import Experts, Mixture
from mixtura.nn.backends.native import instructions
from mixtura.nn.backends.rules import RULES
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.surgery.upcycle import upcycle
from pico import DENSE, SPARSE, pico

OURS = "model.layers.{}.mlp.mixture."


def ours():
    """A llama whose last layers are mixtures, 4 experts each."""
    return upcycle(pico("llama", initializer_range=0.2), layers=[1, 2], copies=2, shards=2).model


def levels(report):
    return [finding.level for finding in report.findings]


def found(report, level):
    texts = [finding.text for finding in report.findings if finding.level == level]
    assert len(texts) == 1, report.findings
    return texts[0]


def rows(report, role):
    return {row.layer: row for row in report.rows if row.role == role}


def change(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("base", [*DENSE, *SPARSE, "ours"])
def test_a_sound_model_has_no_finding(base, tmp_path):
    model = ours() if base == "ours" else pico(base, **SPARSE.get(base, {}))
    model.save_pretrained(tmp_path)
    report = doctor(model, folder=tmp_path)
    assert not [finding for finding in report.findings if finding.level != "note"]
    assert sum(row.numbers for row in report.rows) == sum(p.numel() for p in model.parameters())
    keys = {f"model.decoder.layers.{i}.self_attn.k_proj.bias" for i in range(3)} if base == "opt" else set()
    assert {name for row in report.rows if row.gradient != "yes" for name in row.tensors} == keys
    assert report.stored.tensors > 0
    assert not any(report.stored[1:])


def test_rows_say_what_is_frozen_and_what_gets_gradient():
    model = ours()
    freeze(model, ["layers[1].experts[0:3]", "layers[2].routers", "norms"])
    report = doctor(model)
    assert (rows(report, "experts")[1].frozen, rows(report, "experts")[1].gradient) == ("experts 0-2", "yes")
    assert (rows(report, "experts")[2].frozen, rows(report, "experts")[2].gradient) == ("no", "yes")
    assert (rows(report, "routers")[2].frozen, rows(report, "routers")[2].gradient) == ("yes", "-")
    assert (rows(report, "routers")[1].frozen, rows(report, "routers")[1].gradient) == ("no", "yes")
    assert {row.frozen for row in report.rows if row.role == "norms"} == {"yes"}
    assert rows(report, "experts")[1].tensors == tuple(f"{OURS.format(1)}experts.{p}_proj" for p in ("gate_up", "down"))
    assert (rows(report, "experts")[1].dtype, rows(report, "experts")[1].device) == ("float32", "cpu")


def test_the_model_is_left_as_it_was():
    model = ours().train()
    model.model.layers[0].eval()
    gradients = [torch.full_like(p, 0.5) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    steps = []
    first = next(model.parameters())
    first.register_post_accumulate_grad_hook(steps.append)  # as an optimizer that steps in the backward call
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = doctor(model)
    assert steps == []
    assert report.rows[0].gradient == "yes"
    assert all(p.grad is g and (g == 0.5).all() for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.model.layers[0].training
    model(torch.ones(1, 2, dtype=torch.long)).logits.sum().backward()
    assert len(steps) == 1


def test_gradients_are_proved_against_autograd():
    """Naive: all gradients at once, of the same loss."""
    model = ours()
    model.lm_head.register_parameter("unused", nn.Parameter(torch.ones(3)))
    report = doctor(model)
    assert report.probe.tokens == 128
    ids = torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(0))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert report.probe.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        stack = parameter.grad is not None and ".experts." in name
        gradients = [] if parameter.grad is None else parameter.grad if stack else [parameter.grad]
        live = {e for e, gradient in enumerate(gradients) if gradient.any()}
        assert report.probe.live.get(name, frozenset()) == live
    assert report.probe.largest_gradient == max(p.nbytes for p in model.parameters())
    assert found(report, "warning") == "no gradient reaches lm_head.unused: nothing that is computed depends on them"


def test_an_expert_that_no_token_chooses_is_named():
    model = ours()
    with torch.no_grad():
        mixtures(model)["1"].router.gate.bias = nn.Parameter(torch.tensor([0.0, 0.0, -1e6, 0.0]))
    report = doctor(model)
    assert "none of 128 random tokens chose layer 1 expert 2, so no gradient" in found(report, "warning")
    assert rows(report, "experts")[1].gradient == "experts 0-1, 3"
    chosen = next(facts for facts in report.routers if facts.layer == "1").chosen_E
    assert chosen[2] == 0
    assert sum(chosen) == 128 * 2


def test_an_expert_that_is_run_without_gradient_is_told_apart():
    model = ours()
    with torch.no_grad():
        for part in ("gate_up_proj", "down_proj"):
            getattr(mixtures(model)["2"].experts, part)[1:3] = 0
    warnings = [finding.text for finding in doctor(model).findings]
    assert warnings[0] == (
        "all is 0 in expert 1-2 of model.layers.2.mlp.mixture.experts.gate_up_proj, expert 1-2 of "
        "model.layers.2.mlp.mixture.experts.down_proj: dead, unless that is meant"
    )
    assert warnings[1].startswith("layer 2 expert 1-2: run, but without gradient")


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_a_weight_that_is_no_number_is_named(value, what):
    model = ours()
    with torch.no_grad():
        mixtures(model)["1"].experts.down_proj[3, 0, 0] = value
    report = doctor(model)
    assert report.findings[0].level == "error"
    assert report.findings[0].text == f"{what} in expert 3 of {OURS.format(1)}experts.down_proj: load or train it again"
    assert report.findings[1].text == "the loss is nan on 128 random tokens: look for NaN among the weights"
    assert {row.gradient for row in report.rows} == {"-"}
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["probe"]["loss"] is None


@pytest.mark.parametrize("family", ["ours", "mixtral"])
def test_a_renormalized_top_1_gate_is_found_and_shown(family):
    if family == "ours":
        with pytest.warns(MixturaWarning, match="top-1"):
            router = TopKRouter(32, 4, 1)
        model = convert(pico("llama"), {1: Mixture(router, Experts(4, 32, 16))})
        layers, name = "1", "model.layers.1.mlp.mixture.router.gate.weight"
    else:
        model = pico("mixtral", num_local_experts=4, num_experts_per_tok=1)
        layers, name = "0, 1, 2", "model.layers.0.mlp.gate.weight"
    report = doctor(model)
    texts = [finding.text for finding in report.findings if finding.level == "warning"]
    assert any(text.startswith(f"layer {layers}: a renormalized top-1 gate is constant 1") for text in texts)
    assert any(text.startswith(f"the gradient of {name}") and "does not depend on the router" in text for text in texts)


def test_routers_and_backend_are_said():
    report = doctor(ours())
    assert [(f.layer, f.experts, f.k, f.selection, f.balance) for f in report.routers] == [
        ("1", 4, 2, {"renormalize": 1.0}, True),
        ("2", 4, 2, {"renormalize": 1.0}, True),
    ]
    assert report.backend == "mixtura"
    model = pico("mixtral")
    model.set_experts_implementation("eager")
    report = doctor(model)
    assert report.backend == "eager"
    assert [(facts.layer, facts.k) for facts in report.routers] == [("0", 2), ("1", 2), ("2", 2)]
    assert "router_aux_loss_coef is 0.001" in found(report, "note")
    assert doctor(pico("llama")).backend == ""


def test_what_computes_experts_here_and_which_are_left_to_torch():
    model = ours()
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    experts[1].act_fn = torch.tanh
    report = doctor(model)
    seen, (name, available) = report.computing, instructions()
    assert (seen.no_library, seen.instructions, list(seen.available)) == ("", name, available)
    assert seen.threads == torch.get_num_threads()
    assert seen.rules == RULES
    (reason,) = seen.left_to_torch
    assert reason == "the activation is not one of its own"
    (left,) = seen.left_to_torch[reason]
    assert model.get_submodule(left) is experts[1]
    text = report_text(report)
    assert f"native library: {name} on {seen.threads} threads; this processor has" in text
    assert "torch computes: model.layers.2." in text
    assert all(f"{rule.takes}: {rule.when}: {rule.because[:20]}" in " ".join(text.split()) for rule in RULES)
    assert json.loads(json.dumps(report.to_dict()))["computing"]["left_to_torch"] == {reason: [left]}
    assert doctor(pico("llama")).computing is None


def test_a_router_without_a_path_for_a_balance_loss_is_named():
    model = ours()
    router = mixtures(model)["2"].router
    router.gate.register_forward_hook(lambda module, args, logits: logits.detach())
    report = doctor(model)
    texts = [finding.text for finding in report.findings]
    assert "layer 2: no balance loss can reach the router, whose logits have no gradient" in texts
    assert f"no gradient reaches {OURS.format(2)}router.gate.weight: nothing that is computed depends on them" in texts


def test_what_an_export_lacks_is_said():
    assert doctor(ours()).export["qwen2_moe"] == ""
    model = upcycle(pico("gpt2"), layers=[1]).model
    report = doctor(model)
    assert "attention" in report.export["qwen2_moe"]
    assert "no stock family can hold this model" in found(report, "note")
    assert doctor(pico("mixtral")).export == {}


class Int8Linear(nn.Module):
    """A linear layer of codes and a scale, as quantizers make them."""

    def __init__(self, linear, as_buffer):
        super().__init__()
        scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        if as_buffer:
            self.register_buffer("weight", codes)
        else:
            self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("as_buffer", [True, False])
def test_experts_that_a_quantizer_did_not_see_are_named(as_buffer):
    model = ours()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Int8Linear(layer.self_attn.q_proj, as_buffer)
        layer.self_attn.o_proj = Int8Linear(layer.self_attn.o_proj, as_buffer)
    report = doctor(model)
    assert [(r.dtype, len(r.tensors)) for r in report.rows if r.quantized and r.layer == 1] == [("int8", 2)]
    assert "attention are quantized, but the experts are torch.float32 (0.1 MB)" in found(report, "warning")
    assert f"{OURS.format(1)}experts.gate_up_proj" in found(report, "warning")


def test_a_missing_tensor_is_named_although_nothing_can_be_loaded(tmp_path):
    ours().save_pretrained(tmp_path)
    names = [f"{OURS.format(1)}experts.{e}.down_proj.weight" for e in (0, 3)] + ["model.norm.weight"]
    change(tmp_path, lambda weights: [weights.pop(name) for name in names])
    report = examine(tmp_path)
    assert report.stored.missing == sorted(names)
    assert levels(report)[:2] == ["error", "error"]
    assert report.findings[0].text.startswith("the model cannot be loaded: ")
    assert (
        report.findings[1].text
        == f"the files lack {', '.join(sorted(names))}: loading would draw them anew; get whole files"
    )
    assert {row.device for row in report.rows} == {"meta"}
    assert report.probe is None


def test_other_shapes_and_tensors_without_a_place_are_named(tmp_path):
    pico("mixtral").save_pretrained(tmp_path)
    name = next(name for name in load_file(tmp_path / "model.safetensors") if ".experts.2." in name)
    change(tmp_path, lambda weights: weights.update({name: weights[name][:-1].clone(), "model.extra": torch.zeros(2)}))
    report = examine(tmp_path)
    assert list(report.stored.mismatched) == [name]
    assert report.stored.unexpected == ["model.extra"]
    assert any(f.text.startswith(f"{name} has shape [") and "it is not loaded" in f.text for f in report.findings)
    assert any(f.text == "the files hold model.extra, for which the model has no place" for f in report.findings)


def test_a_tensor_without_a_place_is_a_finding_and_no_warning(tmp_path):
    pico("llama").save_pretrained(tmp_path)
    change(tmp_path, lambda weights: weights.update({"model.extra": torch.zeros(2)}))
    assert found(examine(tmp_path), "warning") == "the files hold model.extra, for which the model has no place"


@pytest.mark.parametrize("base", ["llama", "mixtral", "gpt2", "gemma", "opt", "ours"])
def test_values_are_compared_with_the_files(base, tmp_path):
    model = ours() if base == "ours" else pico(base)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not any(compare_with_files(loaded, tmp_path)[1:])
    with torch.no_grad():
        [*model.parameters()][-3].view(-1)[0] += 1
    stored = compare_with_files(model, tmp_path)
    assert len(stored.differing) == 1
    notes = [finding.text for finding in doctor(model, folder=tmp_path).findings if finding.level == "note"]
    assert notes[0] == f"values of {stored.differing[0]} are others than in the files (trained since, or not loaded)"


def test_files_that_were_not_loaded_as_they_are_are_an_error(tmp_path, monkeypatch):
    pico("llama").save_pretrained(tmp_path)
    other = pico("llama")
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    monkeypatch.setattr("mixtura.hf.load.load_model", lambda name: (other, None))
    assert found(examine(tmp_path), "error") == "values of model.norm.weight were not loaded as they are"


def test_sharded_files_are_compared(tmp_path):
    model = pico("mixtral")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not any(compare_with_files(model, tmp_path)[1:])


def test_tied_tensors_need_one_place(tmp_path):
    model = pico("gemma")
    model.save_pretrained(tmp_path)
    report = examine(tmp_path)
    assert report.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert report.stored.missing == []


def test_adapters_have_their_rows_and_their_first_factor_waits(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.mixture.experts.down_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    for report in (doctor(model, folder=tmp_path / "base"), examine(tmp_path / "adapter")):
        assert {row.frozen for row in report.rows if not row.role.startswith("adapters")} == {"yes"}
        adapters = [row for row in report.rows if row.role == "adapters in experts"]
        assert {(row.frozen, row.gradient, row.layer) for row in adapters} == {
            ("no", gradient, layer) for gradient in ("zero", "yes") for layer in (1, 2)
        }
        assert "as it is while the factor beside them is 0" in found(report, "note")
        assert not [finding for finding in report.findings if finding.level != "note"]
    assert not any(doctor(model, folder=tmp_path / "base").stored[1:])


def test_all_frozen_is_said():
    model = ours()
    freeze(model, "all")
    report = doctor(model)
    assert found(report, "note") == "every parameter is frozen: nothing would be trained; unfreeze some"
    assert {row.gradient for row in report.rows} == {"-"}


def test_a_model_that_fails_is_a_finding():
    model = ours()
    model.lm_head = nn.Linear(31, 64, bias=False)
    report = doctor(model)
    assert "the model failed on random tokens" in found(report, "error")
    assert report.probe is None


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="is no model"):
        examine(tmp_path)
    with pytest.raises(UnknownNameError, match="did you mean 'smollm2-135m'"):
        examine("smollm2-135")
    with pytest.raises(FileFormatError, match=r"weights in .* cannot be read"):
        doctor(pico("llama"), folder=tmp_path)
    pico("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"123")
    with pytest.raises(FileFormatError, match="cannot be loaded"):
        examine(tmp_path)
    no_decoder = nn.Linear(2, 2)
    no_decoder.config = pico("llama").config
    with pytest.raises(NotExpressibleError, match="no list of"):
        doctor(no_decoder)


def test_the_text_is_narrow_and_says_what_matters():
    model = ours()
    freeze(model, "layers[1].experts[0]")
    text = report_text(doctor(model))
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert (
        lines[0] == f"MixturaLlamaForCausalLM: {sum(p.numel() for p in model.parameters()):,} parameters in 30 tensors"
    )
    assert "attention     0-2          12       9,216  float32  cpu     no         yes" in lines
    assert "experts       1             2       9,216  float32  cpu     experts 0  yes" in lines
    assert "mixtures in layer 1-2: 4 experts, 2 a token, renormalize 1.0; a balance loss reaches it" in lines
    assert "experts run on: mixtura" in lines
    assert "export: qwen2_moe" in lines
    assert lines[-1] == "nothing is wrong"


def test_long_names_are_wrapped():
    model = ours()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    text = report_text(doctor(model))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "and 27 more: load or train it again" in " ".join(text.split())


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_ranges(numbers, text):
    assert ranges(numbers) == text
