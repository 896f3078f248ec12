"""What every command needs, on disk: a dense model, a mixture, text, a recipe; and how a command fails in one line."""

import dataclasses
import json
from pathlib import Path

from typer.testing import CliRunner

from mixtura.cli.main import app
from mixtura.hf.save import save_model
from pico import pico
from training import runs
from training.byte_tokenizer import VOCABULARY_SIZE, byte_tokenizer

DOMAINS = ("words", "digits")


def run(*arguments):
    """A command line."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(result, message):
    """Exit code 2 and one line that says why."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert message in lines[0], lines[0]


def tree(folder):
    """Everything below a folder, by relative path: contents of files, None for folders."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@dataclasses.dataclass(frozen=True)
class Places:
    """Paths.

    Attributes:
        dense: a pico Llama with a tokenizer of bytes.
        mixture: the same with two mixtures.
        recipe: of two steps that train the dense model.
        results: an empty folder.
    """

    dense: Path
    mixture: Path
    recipe: Path
    results: Path

    @classmethod
    def made(cls, folder):
        """Write all of it into an existing folder."""
        places = cls(*(folder / name for name in ("dense", "mixture", "recipe.yaml", "results")))
        tokenizer = byte_tokenizer()
        save_model(pico("llama", vocab_size=VOCABULARY_SIZE), places.dense, tokenizer=tokenizer)
        save_model(runs.model("llama"), places.mixture, tokenizer=tokenizer)
        for name, texts in runs.corpus().train.items():
            (folder / name).mkdir()
            for i, text in enumerate(texts):
                (folder / name / f"{i}.txt").write_text(text, encoding="utf-8")
        train = {"steps": 2, "batch_size": 2, "parameters": "all", "save_every": 1}
        data = {"domains": [f"{name}={folder / name}" for name in DOMAINS], "sequence_length": 16}
        recipe = {"model": str(places.dense), "data": data, "train": train}
        places.recipe.write_text(json.dumps(recipe, ensure_ascii=False), encoding="utf-8")
        places.results.mkdir()
        return places

    def commands(self, out=None):
        """Arguments of every command that writes, by name; they write to ``out``."""
        out = self.results / "out" if out is None else out
        return {
            "upcycle": ("upcycle", self.dense, out, "--layers", "1"),
            "export": ("export", self.mixture, out),
            "train": ("train", self.recipe, out, "--quiet"),
            "inspect": ("inspect", self.mixture, "--text", "one two", "--out", out),
            "inspect-trace": (
                *("inspect", self.mixture, "--text", "one two", "--out", self.mixture.with_name("report.html")),
                *("--trace", out),
            ),
            "demo": ("demo", "--out", out, "--model", self.dense, "--steps", "1", "--quiet"),
        }
