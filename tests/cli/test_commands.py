"""The command line: help, results, and one line with an exit code for everything that goes wrong."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

import mixtura.hf
from mixtura.cli.main import app
from mixtura.core import OptionError, registry
from pico import pico
from training.byte_tokenizer import byte_tokenizer

COMMANDS = ("demo", "methods", "fetch", "upcycle", "export", "generate", "train", "eval", "inspect", "doctor")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def dense(tmp_path):
    """A pico Llama with a tokenizer of bytes, on disk."""
    folder = tmp_path / "dense"
    tokenizer = byte_tokenizer()
    pico("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    """Two domains of text of one's own."""
    folder = tmp_path / "text"
    for name, words in (("a", "one two three four "), ("b", "eins zwei drei vier ")):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            (folder / name / f"{number}.txt").write_text(f"{number} " + words * 40)
    return folder


def fails(result, code, message):
    assert result.exit_code == code, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: mixtura {command}" in " ".join(result.output.split())


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from mixtura.cli.main import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version():
    assert run("--version").output == f"mixtura {mixtura.__version__}\n"


def test_methods_are_all_listed_also_for_machines():
    rows = json.loads(run("methods", "--json").output)["methods"]
    assert [row["key"] for row in rows] == [row.key for row in registry.methods()]
    routers = run("methods", "--role", "router").output
    assert "topk-softmax" in routers
    assert "sparse-upcycling" not in routers


def test_methods_say_what_came_of_their_claims(monkeypatch):
    results = {"topk-softmax": SimpleNamespace(verdict="partly")}
    monkeypatch.setattr("mixtura.evidence.scripts.known_results", lambda: results)
    rows = json.loads(run("methods", "--json").output)["methods"]
    assert {row["key"]: row["verdict"] for row in rows if row["verdict"]} == {"topk-softmax": "partly"}
    (line,) = [line for line in run("methods").output.splitlines() if line.startswith("topk-softmax ")]
    assert " partly " in line


def test_methods_are_listed_without_evidence_too(monkeypatch):
    def folder():
        raise OptionError("not installed")

    monkeypatch.setattr("mixtura.evidence.scripts.folder", folder)
    rows = json.loads(run("methods", "--json").output)["methods"]
    assert {row["verdict"] for row in rows} == {None}


def test_upcycle_inspect_export_and_generate(dense, text, tmp_path):
    out = tmp_path / "mixture"
    made = run("upcycle", dense, out, "--layers", "last:2", "--option", "copies=3", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["max_logit_difference"] < 1e-4
    assert "--option copies=3" in (out / "README.md").read_text()

    report = tmp_path / "report.html"
    seen = run("inspect", out, "--text", "one two", "--out", report, "--trace", tmp_path / "t.safetensors", "--json")
    assert seen.exit_code == 0, seen.output
    assert set(json.loads(seen.stdout)["balance"]) == {"1", "2"}
    assert report.read_text().startswith("<!doctype html>")

    checked = run("export", out, "--check", "--json")
    assert json.loads(checked.stdout)["lacks"]["qwen2_moe"] == ""
    exported = run("export", out, tmp_path / "stock")
    assert exported.exit_code == 0, exported.output
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["model_type"] == "qwen2_moe"
    assert run("generate", out, "--prompt", "one", "--tokens", "3").output.startswith("one")


def recipe(tmp_path, model, text, **train):
    options = {"steps": 2, "batch_size": 2, "parameters": "all", **train}
    path = tmp_path / "recipe.yaml"
    data = {"domains": [f"{n}={text / n}" for n in "ab"], "sequence_length": 32}
    path.write_text(json.dumps({"model": str(model), "data": data, "train": options}))
    return path


def test_train_dry_run_and_eval(dense, text, tmp_path):
    path = recipe(tmp_path, dense, text)
    counted = json.loads(run("train", path, "--dry-run", "--json").stdout)
    assert counted["tokens"] == 2 * 2 * 32
    done = run("train", path, tmp_path / "out", "--quiet", "--json")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["history"]) == 2
    domains = ",".join(f"{name}={text / name}" for name in "ab")
    measured = run("eval", tmp_path / "out", "--domains", domains, "--quiet", "--json")
    assert set(json.loads(measured.stdout)["bits_per_byte"]) == {"a", "b", "mean"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("upcycle", "MODEL", "OUT", "--method", "sparse-upcyclin"), "did you mean 'sparse-upcycling'"),
        (("upcycle", "MODEL", "OUT", "--method", "topk-softmax"), "unknown surgery 'topk-softmax'"),
        (("upcycle", "MODEL", "OUT", "--option", "copis=3"), "did you mean 'copies'"),
        (("upcycle", "MODEL", "OUT", "--option", "router_rows_CD=1"), "unknown option"),
        (("upcycle", "MODEL", "OUT", "--option", "copies"), "NAME=VALUE"),
        (("upcycle", "MODEL", "OUT", "--option", "k=50"), "k must be"),
        (("upcycle", "MODEL", "OUT", "--layers", "last:9"), "layers"),
        (("upcycle", "smollm2-135", "OUT"), "did you mean 'smollm2-135m'"),
        (("upcycle", "EMPTY", "OUT"), "is no model"),
        (("export", "MODEL", "OUT"), "has no mixtures"),
        (("export", "MODEL"), "--check"),
        (("inspect", "MODEL", "--text", "x"), "no mixture that capture could see"),
        (("eval", "MODEL", "--domains", "man-dee"), "did you mean 'man-de'"),
        (("fetch", "smollm"), "did you mean 'smollm2-135m'"),
        (("methods", "--role", "routr"), "did you mean 'router'"),
        (("train", "MISSING"), "cannot be read"),
        (("demo", "--out", "MODEL"), "holds other things"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, dense, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"MODEL": dense, "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty", "MISSING": tmp_path / "no.yaml"}
    fails(run(*[places.get(argument, argument) for argument in arguments]), 2, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "empty"]


def test_a_folder_with_something_in_it_is_not_touched(dense, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    fails(run("upcycle", dense, tmp_path / "mine"), 2, "new or empty folder")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["note.txt"]


def test_truncated_weights_are_named(dense, tmp_path):
    weights = dense / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    fails(run("generate", dense, "--prompt", "x"), 2, "cannot be loaded")


def test_a_full_disk_is_one_line(dense, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    fails(run("upcycle", dense, tmp_path / "out"), 2, "No space left on device")
    assert not (tmp_path / "out").exists()


def test_interruption_is_130(dense, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mixtura.hf.load.load_model", interrupted)
    fails(run("upcycle", dense, tmp_path / "out"), 130, "interrupted")


def test_a_bug_is_one_line_and_says_how_to_see_more(dense, tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something of ours")

    monkeypatch.setattr("mixtura.hf.load.load_model", broken)
    fails(run("upcycle", dense, tmp_path / "out"), 1, "RuntimeError: something of ours (this is a bug; MIXTURA_DEBUG=1")


def test_wrong_usage_is_typers_own():
    assert run("upcycle").exit_code == 2
    assert "Did you mean 'upcycle'" in run("upcycl").output


OWN = {
    (name, flag.name, flag.opts[0])
    for name, command in typer.main.get_command(app).commands.items()
    for flag in command.params
    if any(parameter.name == "option" for parameter in command.params)
}


@pytest.mark.parametrize(("command", "name", "flag"), sorted(OWN))
def test_what_a_command_has_by_itself_is_no_option_of_the_method(command, name, flag, dense, tmp_path):
    result = run(command, dense, tmp_path / "out", "--option", f"{name}=4")
    fails(result, 2, f"{name!r} is no option of the method; the command takes it as {flag}")
    assert not (tmp_path / "out").exists()


def test_commands_with_options_of_methods_are_known():
    assert {("quantize", "bits", "--bits"), ("install", "start", "--start"), ("upcycle", "layers", "--layers")} <= OWN
