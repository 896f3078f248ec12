"""Training: what learns, what stays, and what a run refuses."""

import dataclasses
import re

import pytest
import safetensors
import torch
import yaml
from transformers import AutoModelForCausalLM

from mixtura.core.errors import FileFormatError, MixturaError, MixturaWarning, OptionError
from mixtura.hf import mixtures
from mixtura.training.train import train
from pico import pico
from training.byte_tokenizer import VOCABULARY_SIZE, byte_tokenizer
from training.runs import corpus, model, recipe, run


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_falls_and_only_the_mixtures_change(tmp_path, family):
    start = model(family)
    before = snapshot(start)
    result = run(tmp_path / "out", recipe(learning_rate=3e-2, steps=24), start)
    first, last = result.history[0][1], result.history[-1][1]
    assert last < first - 0.2
    ours = {name for name in before if ".mixture." in name}
    assert changed(before, start) == ours
    assert [step for step, _ in result.history] == list(range(1, 25))
    assert result.tokens_trained == 24 * 2 * 2 * 16
    assert result.resumed_from == 0


def test_rows_have_every_part_and_the_parts_make_the_loss(tmp_path):
    result = run(tmp_path / "out")
    for row in result.rows:
        balance = 0.01 * row["load-balancing"] + 0.001 * row["router-z-loss"]
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 2 * balance, rel=1e-6)  # two layers
    assert {"grad_norm", "learning_rate"} <= set(result.rows[0])


def test_log_every_keeps_the_rows_of_its_steps(tmp_path):
    every = run(tmp_path / "every").history
    third = run(tmp_path / "third", recipe(log_every=3)).history
    assert third == [every[2], every[5]]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("feed-forward:1-2", r"transformer\.h\.[12]\.mlp\."),
        ("feed-forward:0", r"transformer\.h\.0\.mlp\."),
        ("all", r"."),
    ],
)
def test_the_dense_baseline_changes_what_it_names(tmp_path, parameters, expected):
    start = pico("gpt2", vocab_size=VOCABULARY_SIZE)
    before = snapshot(start)
    run(tmp_path / "out", dataclasses.replace(recipe(parameters=parameters), balance={}), start)
    named = {name for name in before if re.match(expected, name)}
    assert named - {n for n in named if n.endswith("attn.c_attn.bias")} <= changed(before, start) <= named


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ("routers", r".*router\."),
        ("layers[-1].experts, layers[0].norms", r"transformer\.h\.(2\.mlp\.mixture\.experts|0\.ln_[12])\."),
        ("attention", r".*attn\."),
    ],
)
def test_roles_are_trained_alone(tmp_path, parameters, expected):
    start = model()
    before = snapshot(start)
    run(tmp_path / "out", dataclasses.replace(recipe(parameters=parameters), balance={}), start)
    assert changed(before, start)
    assert all(re.match(expected, name) for name in changed(before, start))


def test_single_experts_are_trained_alone(tmp_path):
    """With weight decay, which moves what has no gradient."""
    start = model()
    before = snapshot(start)
    how = recipe(parameters="experts[1:3]", weight_decay=0.1)
    run(tmp_path / "out", dataclasses.replace(how, balance={}), start)
    names = changed(before, start)
    assert names
    after = snapshot(start)
    for name in names:
        assert ".experts." in name
        assert [e for e in range(len(after[name])) if not torch.equal(after[name][e], before[name][e])] == [1, 2]


def test_inline_feed_forwards_can_be_trained(tmp_path):
    start = pico("opt", vocab_size=VOCABULARY_SIZE)
    before = snapshot(start)
    run(tmp_path / "out", dataclasses.replace(recipe(parameters="feed-forward:1"), balance={}), start)
    names = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}
    assert changed(before, start) == {f"model.decoder.layers.1.{name}" for name in names}


def test_a_router_rate_of_zero_freezes_the_routers(tmp_path):
    start = model()
    before = snapshot(start)
    with pytest.warns(MixturaWarning, match="have no gradient path to the routers of layers 1, 2"):
        run(tmp_path / "out", recipe(router_learning_rate=0), start)
    assert not any(".router." in name for name in changed(before, start))
    assert any(".experts." in name for name in changed(before, start))


def test_accumulation_gives_the_cross_entropy_of_the_whole_step(tmp_path):
    """One step in one piece or in four: the same loss and gradient, without balance terms and dropout."""
    rows = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        run_recipe = recipe(steps=1, batch_size=batch_size, gradient_accumulation=accumulation)
        result = run(tmp_path / f"{accumulation}", dataclasses.replace(run_recipe, balance={}), model("llama"))
        rows.append(result.rows[0])
    assert rows[0]["cross_entropy"] == pytest.approx(rows[1]["cross_entropy"], rel=1e-6)
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-5)


@pytest.fixture
def with_bfloat16(monkeypatch):
    """A processor that has instructions for it, says torch."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": False})


def test_a_processor_without_bfloat16_is_warned_about(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})
    with pytest.warns(MixturaWarning, match="this processor has no instructions for it"):
        run(tmp_path / "out", recipe(precision="bfloat16", steps=1))


@pytest.mark.usefixtures("with_bfloat16")
def test_bfloat16_keeps_parameters_in_float32_and_leaves_the_model_as_it_was(tmp_path):
    """Updates of 1e-5 a step are lost in bfloat16 parameters of size 0.02 and must not be."""
    start = model("llama")
    before = snapshot(start)
    ids = torch.arange(20)[None]
    result = run(tmp_path / "out", recipe(precision="bfloat16", learning_rate=1e-5), start)
    assert {parameter.dtype for parameter in start.parameters()} == {torch.float32}
    moved = [(value - before[name]).abs().max() for name, value in start.state_dict().items() if ".mixture." in name]
    assert all(0 < m < 1e-4 for m in moved)
    reference = run(tmp_path / "reference", recipe(learning_rate=1e-5), model("llama"))
    assert result.history[0] != reference.history[0]  # it did run in bfloat16
    assert result.history[0][1] == pytest.approx(reference.history[0][1], rel=1e-3)
    with torch.no_grad():
        logits = start(ids).logits
        torch.testing.assert_close(logits, reference.model(ids).logits, rtol=0, atol=1e-3)
        assert not torch.equal(logits, logits.bfloat16().float())  # and now no longer does


def test_the_folder_is_a_model_with_its_papers(tmp_path):
    result = run(tmp_path / "out", receipts={"upcycle": {"max_logit_difference": 0.0}})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, result.model(ids).logits)
    assert not result.model.training
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()) == recipe().to_dict()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import mixtura.hf" in card
    assert "max_logit_difference" in card
    assert "trained parameters" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_equal_runs_are_equal(tmp_path):
    assert run(tmp_path / "a").rows == run(tmp_path / "b").rows
    other = run(tmp_path / "c", dataclasses.replace(recipe(), seed=4)).rows
    assert other != run(tmp_path / "d").rows


def refused(tmp_path, message, recipe, start, error=OptionError):
    with pytest.raises(error, match=message):
        train(recipe, tmp_path / "out", model=start, tokenizer=byte_tokenizer(), corpus=corpus(), progress=False)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_the_model_is_refused(tmp_path):
    dense = pico("gpt2", vocab_size=VOCABULARY_SIZE)
    refused(tmp_path, "train.parameters is 'mixtures', but GPT2LMHeadModel has none", recipe(), dense)
    refused(tmp_path, "layer 3, but the layers are 0 .. 2", recipe(parameters="feed-forward:2-3"), dense)
    refused(tmp_path, "needs mixtures, but GPT2LMHeadModel has none", recipe(parameters="all"), dense)
    refused(tmp_path, "is torch.bfloat16: small updates would be lost", recipe(), model().bfloat16())


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    start = model()
    torch.nn.init.constant_(mixtures(start)["1"].experts.down_proj, float("nan"))
    refused(tmp_path, "the loss is nan at step 1; lower learning_rate", recipe(), start, MixturaError)


def test_a_folder_that_exists_is_refused_before_the_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OptionError, match="out must be a new or empty folder"):
        run(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoints_hold_what_is_trained_alone(tmp_path, monkeypatch):
    from mixtura.hf import callbacks
    from mixtura.training import trainer

    seen = {}

    def look(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        (folder,) = [p for p in (tmp_path / "out.checkpoints").glob("checkpoint-*") if p.name.endswith("-2")]
        with safetensors.safe_open(folder / trainer.WEIGHTS, framework="pt") as file:
            seen["names"] = set(file.keys())
        seen["files"] = {path.name for path in folder.iterdir()}
        raise KeyboardInterrupt

    original = callbacks.CompleteMark.on_save
    monkeypatch.setattr(callbacks.CompleteMark, "on_save", look)
    start = model("llama")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", model_=start)
    assert seen["names"] == {name for name in start.state_dict() if ".mixture." in name}
    assert not seen["files"] & {"training_args.bin", "config.json"}
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    from mixtura.training.trainer import check_state

    with pytest.raises(FileFormatError, match="cannot be read"):
        check_state(model(), tmp_path)
    safetensors.torch.save_file({"else": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FileFormatError, match="does not fit the model, first at"):
        check_state(model(), tmp_path)
