"""``mixtura inspect`` on native checkpoints, and what it says of those that it cannot see."""

import json

import pytest
from typer.testing import CliRunner

from mixtura.cli.main import app
from mixtura.traces import Trace
from pico_native import native
from training.byte_tokenizer import byte_tokenizer


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def saved(family, folder):
    """A native checkpoint with a tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    native(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe"])
def test_native_checkpoints(family, tmp_path):
    folder, report, trace = saved(family, tmp_path / "model"), tmp_path / "r.html", tmp_path / "t.safetensors"
    done = run("inspect", folder, "--text", "to be, or not to be", "--out", report, "--trace", trace, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result["balance"]) == set(result["specialization"]) == {"0", "1"}
    assert all(1 <= row["effective_experts"] <= 4 for row in result["balance"].values())
    seen = Trace.load(trace)
    assert len(seen) == 2 * 2 * len(set(seen.position.tolist()))
    ids = byte_tokenizer()("to be, or not to be")["input_ids"]
    assert seen.select((seen.layer == 0) & (seen.slot == 0)).token.tolist() == ids
    page = report.read_text("utf-8")
    assert "Specialization by position" in page
    assert str(folder.name) in page


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", "jetmoe", "doge"])
def test_families_without_decorated_experts_are_named(family, tmp_path):
    done = run("inspect", saved(family, tmp_path / "model"), "--text", "x", "--out", tmp_path / "r.html")
    assert done.exit_code == 2
    (line,) = done.stderr.strip().splitlines()
    assert f"{family} computes its experts in a way of its own" in line
    assert not (tmp_path / "r.html").exists()
