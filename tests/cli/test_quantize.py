"""``mixtura quantize``: a folder becomes a smaller one that loads; wrong input is one line and leaves nothing."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf.decoders import own
from mixtura.cli.main import app
from mixtura.hf.quantizer import quantize_model
from mixtura.nn.quantized_linear import QuantizedLinear
from mixtura.surgery.quantize import quantize
from pico import pico, tokens


def run(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    own().save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_folder_becomes_a_smaller_one(folder):
    result = run(folder / "model", folder / "out", "--bits", 4, "--option", "group_size=64", "--json")
    assert result.exit_code == 0, result.output
    receipt = json.loads(result.stdout)
    assert (receipt["options"]["bits"], receipt["options"]["group_size"], receipt["options"]["linears"]) == (
        4,
        64,
        True,
    )
    sizes = {name: (folder / name / "model.safetensors").stat().st_size for name in ("model", "out")}
    assert abs(sizes["model"] - receipt["bytes"]["before"]) < 20_000
    assert abs(sizes["out"] - receipt["bytes"]["after"]) < 20_000
    assert sizes["out"] < 0.3 * sizes["model"]
    assert "--bits 4 --option group_size=64" in (folder / "out" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out").eval()
    expected = quantize_model(own(), bits=4, group_size=64, linears=True)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, expected(tokens()).logits)


def test_a_tied_head_gets_a_quantized_matrix_of_its_own(tmp_path):
    model = pico("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", tmp_path / "out", "--option", "head=true", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["options"]["head"] is True
    assert "--bits 8 --option head=true" in (tmp_path / "out" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    expected = quantize_model(model, bits=8, linears=True, head=True)
    assert isinstance(loaded.lm_head, QuantizedLinear)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, expected(tokens()).logits)


def test_wrong_input_is_one_line_and_leaves_nothing(folder):
    for options, said in (
        (("--bits", 3), "bits must be one of 8, 4, got 3"),
        (("--option", "groups=3"), "unknown option of the quantizer 'groups'; did you mean 'group_size'?"),
    ):
        result = run(folder / "model", folder / "out", *options)
        assert result.exit_code == 2
        assert said in result.output
        assert not (folder / "out").exists()
    assert run(folder / "model", folder / "out").exit_code == 0
    again = run(folder / "out", folder / "twice")
    assert again.exit_code == 2
    assert "quantized already" in again.output
    assert not (folder / "twice").exists()


def test_the_receipt_says_how_far_logits_are_off():
    model = own()
    with torch.no_grad():
        before = model(tokens()).logits
        made, receipt = quantize(model, bits=8, tokens_BQ=tokens())
        after = made(tokens()).logits
    assert receipt["max_logit_difference"] == pytest.approx(float((after - before).abs().max()))
    assert receipt["tokens_checked"] == tokens().numel()
