"""What a newer mixtura has written: one line that names both versions, and nothing is touched."""

import json

import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from faults.places import fails, run, tree
from mixtura.core.errors import FileFormatError
from mixtura.hf.callbacks import CompleteMark
from mixtura.hf.load import load_model
from mixtura.traces.trace import Trace
from mixtura.training.recipe import Recipe
from training import runs


class Stop(Exception):
    """Ends a run from a callback."""


def stop(self, args, state, *_, **__):
    if state.global_step == 5:
        raise Stop


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """The note of a run that stopped after step 5 with complete checkpoints."""
    with monkeypatch.context() as patch:
        patch.setattr(CompleteMark, "on_step_begin", stop, raising=False)
        with pytest.raises(Stop):
            runs.run(tmp_path / "out")
    return tmp_path / "out.checkpoints" / "run.json"


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_checkpoints(stopped, tmp_path):
    change(stopped, format=2, something_new=3)
    before = tree(tmp_path)
    with pytest.raises(FileFormatError, match="have version 2, known are up to 1; upgrade mixtura"):
        runs.run(tmp_path / "out")
    assert tree(tmp_path) == before
    assert len(runs.run(tmp_path / "out", resume=False).rows) == 8


def test_checkpoints_from_before_there_were_versions(stopped, tmp_path):
    noted = json.loads(stopped.read_text())
    del noted["format"]
    stopped.write_text(json.dumps(noted))
    assert runs.run(tmp_path / "out").resumed_from == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not say which run"),
        ("{", "does not say which run"),
        ("[]", "does not say which run"),
        ("1", "does not say which run"),
        ('{"format": "x"}', "have version 'x', known are up to 1"),
    ],
    ids=["empty", "cut", "list", "number", "version"],
)
def test_a_note_that_is_none(stopped, tmp_path, text, message):
    stopped.write_text(text)
    before = tree(tmp_path)
    with pytest.raises(FileFormatError, match=message):
        runs.run(tmp_path / "out")
    assert tree(tmp_path) == before


def test_a_model(places):
    config = places.mixture / "config.json"
    ours = json.loads(config.read_text())["mixtura"]
    change(config, mixtura={**ours, "version": ours["version"] + 6, "something_new": 3})
    message = (
        f"version {ours['version'] + 6} of the family, known are versions up to {ours['version']}; upgrade mixtura"
    )
    with pytest.raises(FileFormatError, match=message):
        load_model(places.mixture)
    fails(run("generate", places.mixture, "--prompt", "x"), message)


def test_a_trace(tmp_path):
    path = Trace.empty(layers=["0"], experts=[4]).save(tmp_path / "trace")
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file({**load_file(path)}, path, {**metadata, "version": "2"})
    with pytest.raises(FileFormatError, match="has version '2', known are up to 1; upgrade mixtura"):
        Trace.load(path)


def test_a_recipe(places):
    values = json.loads(places.recipe.read_text())
    places.recipe.write_text(json.dumps({**values, "version": 2, "something_new": 3}))
    message = "the recipe has version 2, known are up to 1; upgrade mixtura"
    with pytest.raises(FileFormatError, match=message):
        Recipe.load(places.recipe)
    fails(run("train", places.recipe, places.results / "out"), message)
    assert tree(places.results) == {}


def test_a_recipe_that_was_written_says_its_version(tmp_path):
    runs.run(tmp_path / "out")
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["version"] == 1
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == runs.recipe()
