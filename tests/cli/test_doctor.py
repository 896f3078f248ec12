"""The command ``doctor``: text and JSON, and exit codes."""

import json

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mixtura.cli.main import app
from mixtura.surgery.upcycle import upcycle
from pico import pico


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def saved(tmp_path, edit=None):
    upcycle(pico("llama"), layers=[1], copies=2, shards=2).model.save_pretrained(tmp_path)
    if edit is not None:
        path = tmp_path / "model.safetensors"
        weights = load_file(path)
        edit(weights)
        save_file(weights, path, metadata={"format": "pt"})
    return tmp_path


def test_a_sound_model(tmp_path):
    done = run(saved(tmp_path))
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "nothing is wrong"
    assert any(line.startswith("files: ") and line.endswith("all in the model, bit for bit") for line in lines)


def test_for_machines(tmp_path):
    report = json.loads(run(saved(tmp_path), "--json").stdout)
    assert report["model"] == "MixturaLlamaForCausalLM"
    assert report["findings"] == []
    assert report["backend"] == "mixtura"
    assert report["routers"][0]["k"] == 2
    assert report["stored"]["missing"] == []
    experts = next(row for row in report["rows"] if row["role"] == "experts")
    assert (experts["layer"], experts["gradient"], experts["frozen"], experts["quantized"]) == (1, "yes", "no", False)


def test_what_was_found_is_printed_and_is_no_failure(tmp_path):
    name = "model.layers.1.mlp.mixture.experts.1.down_proj.weight"
    done = run(saved(tmp_path, lambda weights: weights[name].fill_(torch.nan)))
    assert done.exit_code == 0, done.output
    assert "error: NaN in expert 1 of model.layers.1.mlp.mixture.experts.down_proj" in done.stdout


def test_what_cannot_be_loaded_is_examined_all_the_same(tmp_path):
    name = "model.layers.1.mlp.mixture.router.gate.weight"
    done = run(saved(tmp_path, lambda weights: weights.pop(name)))
    assert done.exit_code == 0, done.output
    assert "error: the model cannot be loaded" in done.stdout
    assert f"the files lack {name}" in " ".join(done.stdout.split())


def test_what_is_no_model_is_one_line(tmp_path):
    done = run(tmp_path)
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "is no model" in done.stderr
