"""``mixtura install``: a folder becomes a folder, and everything that goes wrong is one line and leaves nothing."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mixtura.cli.main import app
from mixtura.hf.modeling import routers
from pico import pico
from pico_native import logits, native, tokens
from training.byte_tokenizer import byte_tokenizer


def run(*arguments):
    return CliRunner().invoke(app, ["install", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    """Pico models on disk, one with a tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    native("olmoe", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    pico("llama").save_pretrained(tmp_path / "dense")
    native("llama4_text").save_pretrained(tmp_path / "llama4")
    return tmp_path


def test_help_has_an_example():
    result = run("--help")
    assert result.exit_code == 0
    assert "Example: mixtura install" in " ".join(result.output.split())


def test_a_router_is_installed_and_the_folder_loads(folder):
    out = folder / "out"
    options = ("--layers", "last:1", "--option", "null_experts=2", "--option", "k=3", "--json")
    result = run(folder / "model", out, "--router", "adamoe", *options)
    assert result.exit_code == 0, result.output
    receipt = json.loads(result.stdout)
    assert receipt["options"] == {"null_experts": 2, "k": 3}
    assert json.loads((out / "receipts.json").read_text()) == {"install": receipt}
    card = (out / "README.md").read_text()
    assert "--router adamoe --layers last:1 --start native --option null_experts=2 --option k=3" in card
    assert "import mixtura.hf" in card
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert list(routers(loaded)) == ["1"]
    assert (out / "tokenizer.json").exists() == (folder / "model" / "tokenizer.json").exists()


def test_lines_for_people_and_the_identity(folder):
    result = run(folder / "model", folder / "out", "--router", "topk-softmax")
    assert result.exit_code == 0, result.output
    assert "topk-softmax in layers 0, 1, largest difference of a logit" in result.stdout
    before, after = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("model", "out"))
    torch.testing.assert_close(logits(after, tokens()), logits(before, tokens()), rtol=1e-5, atol=1e-5)


def test_what_reads_later_tokens_must_be_allowed(folder):
    refused = run(folder / "model", folder / "out", "--router", "expert-choice")
    assert refused.exit_code == 2
    assert "reads later tokens" in refused.stderr
    assert not (folder / "out").exists()
    allowed = run(folder / "model", folder / "out", "--router", "expert-choice", "--allow", "expert-choice")
    assert allowed.exit_code == 0, allowed.output
    assert AutoModelForCausalLM.from_pretrained(folder / "out").config.mixtura["allow"] == ["expert-choice"]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("model", ("--router", "topk-sofmax"), "did you mean 'topk-softmax'"),
        ("model", ("--router", "topk-softmax", "--option", "kk=2"), "did you mean 'k'"),
        ("model", ("--router", "topk-softmax", "--option", "k"), "NAME=VALUE"),
        ("model", ("--router", "topk-softmax", "--option", "k=50"), "k must be"),
        ("model", ("--router", "topk-softmax", "--layers", "last:9"), "layers"),
        ("model", ("--router", "topk-softmax", "--start", "old"), "start must be one of"),
        ("model", ("--router", "adamoe"), "null_experts"),
        ("dense", ("--router", "topk-softmax"), "llama has no experts that transformers decorates"),
        ("llama4", ("--router", "topk-softmax"), "llama4_text: its router weighs the inputs of experts"),
        ("nowhere", ("--router", "topk-softmax"), "unknown model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(model, arguments, message, folder):
    there = sorted(path.name for path in folder.iterdir())
    path = folder / model if (folder / model).exists() else model
    result = run(path, folder / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == there
