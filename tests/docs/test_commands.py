"""Every command that the README or a page names is run: with a pico model, texts made here, a table of 30 flowers.

A command in a block of bash is run as it stands, in the order of its page. One between backticks is run with its
capital words filled in. What is not run is listed with the reason, and its options are parsed.
"""

import re
import shlex
import tomllib

import pytest
import typer
import yaml
from typer.testing import CliRunner

from docs.pages import PAGES, ROOT, blocks, text, with_blocks
from mixtura.bench import KINDS
from mixtura.cli.main import app
from mixtura.data import DOMAINS
from mixtura.data.domains import Domain
from pico import pico
from training.byte_tokenizer import byte_tokenizer

NETWORK = "needs the network"
NOT_RUN = {  # by how a command begins
    "make ": NETWORK,
    "pip install ": NETWORK,
    "mixtura demo": NETWORK,
    "mixtura fetch ": NETWORK,
    "mixtura bench ": "takes minutes; the benchmark of limits is run instead",
    ".venv/bin/pytest ": "is a part of the tests themselves",
}
RUN = ("mixtura bench CASE", "mixtura bench limits")
FILLED = {"OUT": "out", "KEY": "topk-softmax", "RECIPE": "recipe.yaml", "TABLE": "flowers.csv", "CASE": "limits"}
MODELS = {"upcycle": "dense", "install": "native"}
INLINE = re.compile(r"`((?:mixtura|make|pip|\.venv/bin/\w+) [^`\n]+)`")


def command_lines(page):
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines if line.strip() and not line.startswith("#")]


def inline_commands():
    """Commands between backticks that are whole; a bare name of a command that needs arguments is no command."""
    found = {command for page in PAGES for command in INLINE.findall(re.sub(r"(?ms)^ *```.*?^ *```$", "", text(page)))}
    return sorted(command for command in found if not _is_only_named(command))


def _is_only_named(command):
    program, name, *arguments = shlex.split(command)
    if program != "mixtura" or arguments or name not in commands():
        return False
    return any(option.required for option in commands()[name].params)


def why_not_run(command):
    """How the command begins, of which ``NOT_RUN`` tells the reason; or nothing."""
    return next((start for start in NOT_RUN if command.startswith(start) and not command.startswith(RUN)), None)


def commands():
    return typer.main.get_command(app).commands


def everything():
    return {line for page in PAGES for line in command_lines(page)} | set(inline_commands())


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with what the commands are about; known names and ids are pico models."""
    from mixtura.hf.load import load_model as load

    monkeypatch.chdir(tmp_path)
    dense, native = _saved("llama", "dense", num_hidden_layers=6), _saved("olmoe", "native", num_hidden_layers=6)
    names = {"smollm2-135m": dense, "allenai/OLMoE-1B-7B-0924": native}
    monkeypatch.setattr("mixtura.hf.load.load_model", lambda name, **options: load(names.get(name, name), **options))
    for name, domain in DOMAINS.items():
        documents = [f"{name} {number}: " + "one two three four five " * 40 for number in range(6)]
        monkeypatch.setitem(DOMAINS, name, Domain(domain.title, lambda documents=documents: iter(documents)))
    _small_limits(monkeypatch)
    _write_recipe(tmp_path / "recipe.yaml")
    lengths = (f"{number % 3 + number / 99:.3f}" for number in range(30))
    (tmp_path / "flowers.csv").write_text("\n".join(["length", *lengths]), encoding="utf-8")
    return tmp_path


def _saved(family, folder, **options):
    tokenizer = byte_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    pico(family, vocab_size=len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _small_limits(monkeypatch):
    from mixtura.bench import limits
    from mixtura.bench.limits import Read

    monkeypatch.setattr(limits, "_PRODUCTS", [(3, 4, 5)])
    monkeypatch.setattr(limits, "_VECTOR", (6, 7))
    monkeypatch.setattr(limits, "Read", lambda who: Read(who, 1 << 16))
    monkeypatch.setattr("mixtura.bench.measuring.used_seconds", lambda own: None)
    monkeypatch.delenv("MIXTURA_PEERS", raising=False)


def _write_recipe(path):
    """The first recipe of its page, with fewer steps."""
    recipe = yaml.safe_load(blocks(ROOT / "docs" / "recipes.md", "yaml")[0])
    recipe["data"]["sequence_length"], recipe["train"] = 32, {"steps": 2, "batch_size": 2}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def run(command):
    """Run a command of ours; it must succeed."""
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, f"{command}\n{done.output}"


@pytest.mark.parametrize("page", with_blocks("bash"))
@pytest.mark.usefixtures("world")
@pytest.mark.filterwarnings("ignore:a top-1 gate:mixtura.core.errors.MixturaWarning")  # the tour's, whose page says why
def test_commands_of_a_page_run_in_turn(page):
    if page.name == "traces.md":
        run("mixtura upcycle smollm2-135m out --layers last:2")
    for line in command_lines(page):
        if not why_not_run(line):
            run(line)


@pytest.mark.parametrize("command", [line for line in inline_commands() if not why_not_run(line)])
@pytest.mark.usefixtures("world")
def test_commands_between_backticks_run(command):
    _, name, *words = shlex.split(command)
    if "MODEL" in words and name not in MODELS:
        run("mixtura upcycle dense mixture --layers last:2 --option k=2")
    filled = [{"MODEL": MODELS.get(name, "mixture"), **FILLED}.get(word, word) for word in words]
    smallest = ["--smoke"] if name == "evidence" and not {"--list", "--smoke"} & set(filled) else []
    run(shlex.join(["mixtura", name, *filled, *smallest]))


def test_what_is_not_run_is_named_by_a_page():
    programs = {start.split()[0] for start in NOT_RUN}
    assert {line.split()[0] for line in everything() if why_not_run(line)} == programs


@pytest.mark.parametrize("command", sorted(line for line in everything() if why_not_run(line)))
def test_what_is_not_run_is_right_as_far_as_can_be_seen(command):
    program, first, *rest = shlex.split(command)
    if program == "mixtura":
        commands()[first].make_context(first, list(rest))
        assert first != "bench" or rest[0] in KINDS
    elif program == "make":
        assert re.search(rf"^{first}:", text(ROOT / "Makefile"), re.MULTILINE)
    elif program == "pip":
        (extra,) = re.findall(r"\[(\w+)\]", command)
        assert extra in tomllib.loads(text(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    else:
        assert (ROOT / first).is_file()


def test_of_our_commands_only_those_are_not_run_that_fetch_or_measure():
    left = {shlex.split(line)[1] for line in everything() if why_not_run(line) and line.startswith("mixtura ")}
    assert {"demo", "fetch"} <= left <= {"demo", "fetch", "bench"}


def test_every_command_that_there_is_is_run_or_listed():
    named = {shlex.split(command)[1] for command in everything() if command.startswith("mixtura ")}
    assert named == set(commands())
