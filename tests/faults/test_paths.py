"""Names that people give to folders: the whole way works in them, or one line says why not."""

import os
import shlex

import pytest
import torch

from faults.places import Places, fails, run, tree
from mixtura.core.errors import OptionError
from mixtura.core.files import check_new_folder, write_file, write_folder
from mixtura.hf.callbacks import CompleteMark
from mixtura.hf.load import load_model
from mixtura.hf.save import save_model
from mixtura.traces.trace import Trace
from training import runs
from training.byte_tokenizer import byte_tokenizer

NAMES = {
    "spaces": " a \n b ",
    "letters": "Grüße Gru\u0308ße 混合专家 مزيج خبراء 🧪",
    "shell": '-it\'s "a" $HOME `x`=b,c#d%20\\e',
    "pattern": "..a[0]*?.",
    "suffix": "a.gguf",
    "known": "smollm2-135m",
    "long": "ü" * 121 + "n",  # the folder of checkpoints beside it has a name of 255 bytes
}
every_name = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


class Stop(Exception):
    """Ends a run from a callback."""


def stop(self, args, state, *_, **__):
    if state.global_step == 5:
        raise Stop


@every_name
def test_the_whole_way(tmp_path, monkeypatch, name):
    """Train, stop, resume, save, load, see, export: inside of a folder of that name, to a place of that name."""
    here = tmp_path / name
    out = here / name
    with monkeypatch.context() as patch:
        patch.setattr(CompleteMark, "on_step_begin", stop, raising=False)
        with pytest.raises(Stop):
            runs.run(out, model_=runs.model("llama"))
    result = runs.run(out, model_=runs.model("llama"))
    assert result.resumed_from == 4
    loaded, tokenizer = load_model(out)
    tokens = torch.tensor([tokenizer("the other thing")["input_ids"]])
    assert torch.equal(loaded(tokens).logits, result.model(tokens).logits)
    seen = run("inspect", out, "--text", "the other", "--out", here / "report.html", "--trace", here / "trace")
    assert seen.exit_code == 0, seen.output
    assert len(Trace.load(here / "trace")) > 0
    exported = run("export", out, here / "stock")
    assert exported.exit_code == 0, exported.output
    assert sorted(path.name for path in here.iterdir()) == sorted([name, "report.html", "stock", "trace"])


@every_name
def test_the_card_is_one_heading_whatever_the_name(tmp_path, name):
    out = save_model(runs.model("llama"), tmp_path / name, tokenizer=byte_tokenizer())
    card = (out / "README.md").read_text(encoding="utf-8")
    headings = [line for line in card.splitlines() if line.startswith("# ")]
    assert headings == ["# " + " ".join(name.split())]


def test_the_command_of_the_card_can_be_pasted(places):
    out = places.results / NAMES["shell"]
    assert run(*places.commands(out)["upcycle"]).exit_code == 0
    (line,) = (line for line in (out / "README.md").read_text().splitlines() if line.startswith("mixtura upcycle"))
    assert shlex.split(line)[2:4] == [str(places.dense), NAMES["shell"]]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127 + "n"], ids=["ascii", "umlauts"])
def test_the_longest_names_can_be_written(tmp_path, name):
    with write_file(tmp_path / name) as partial:
        partial.write_text("1")
    with write_folder(tmp_path / "sub" / name) as partial:
        (partial / name).write_text("2")
    assert (tmp_path / name).read_text() == "1"
    assert (tmp_path / "sub" / name / name).read_text() == "2"


def test_a_name_without_room_for_checkpoints_is_refused_before_training(tmp_path):
    with pytest.raises(OptionError, match="too long a name for a folder of checkpoints beside it"):
        runs.run(tmp_path / ("n" * 244))
    assert list(tmp_path.iterdir()) == []


def deep(folder, length):
    """A path of that many bytes."""
    path = str(folder)
    while len(path) + 202 < length:
        path += "/" + "x" * 100
    return type(folder)(path + "/" + "y" * (length - len(path) - 1))


@pytest.mark.parametrize("command", ["upcycle", "export", "train", "inspect", "inspect-trace"])
@pytest.mark.parametrize("length", [4_080, 4_096, 9_000])
def test_a_path_that_is_too_long_is_one_line(places, command, length):
    fails(run(*places.commands(deep(places.results, length))[command]), "File name too long")
    assert [content for content in tree(places.results).values() if content is not None] == []


@pytest.mark.parametrize("length", [4_030, 4_060, 4_095])
def test_long_work_with_too_long_a_path_is_refused_before_it_begins(tmp_path, length):
    with pytest.raises(OptionError, match="out cannot be written, File name too long"):
        runs.run(deep(tmp_path, length))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["upcycle", "export", "train", "inspect", "inspect-trace"])
def test_a_path_that_is_not_utf_8_is_one_line(places, command):
    fails(run(*places.commands(places.results / os.fsdecode(b"\xff\xfe"))[command]), "must be in UTF-8")
    assert tree(places.results) == {}


def test_the_folder_one_stands_in(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert len(runs.run(".").rows) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]
    assert (tmp_path / "here" / "model.safetensors").is_file()


def test_a_mounted_disk_itself_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: str(path).endswith("out"))
    with pytest.raises(OptionError, match="a disk is mounted at"):
        check_new_folder(tmp_path / "out")
    check_new_folder(tmp_path / "out" / "below")


def test_places_with_their_parents(tmp_path):
    places = Places.made(tmp_path)
    done = run(*places.commands(places.results / "a" / "b" / "out")["train"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (places.results / "a" / "b").iterdir()) == ["out"]
