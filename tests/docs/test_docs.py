"""The docs are true: their code runs, their recipes parse, their counts and tables are those of the code."""

import json
import re

import pytest
import typer
import yaml

from docs.pages import FENCE, PAGES, ROOT, blocks, docs_module, text, with_blocks
from mixtura.cli.main import app
from mixtura.core import registry
from mixtura.core.errors import UnknownNameError
from mixtura.data import SOURCES
from mixtura.hf import families
from mixtura.hf.capabilities import TARGETS
from mixtura.hf.families import known_families
from mixtura.training.recipe import Recipe
from pico import DENSE, pico
from training.byte_tokenizer import VOCABULARY_SIZE, byte_tokenizer

PACKAGED = dict(SOURCES)  # scripts of evidence add theirs when they are loaded
LANGUAGES = {"python", "bash", "yaml", "text"}


def hooks():
    return docs_module("hooks")


@pytest.fixture
def small_world(monkeypatch, tmp_path):
    """Every model is a pico Llama, files go to a temporary folder, and methods of examples are forgotten."""

    def load_model(name, **_):
        tokenizer = byte_tokenizer()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        return pico("llama", vocab_size=VOCABULARY_SIZE, num_hidden_layers=6, head_dim=16), tokenizer

    monkeypatch.setattr("mixtura.hf.load.load_model", load_model)
    monkeypatch.setattr(registry, "_TABLE", {row.key: row for row in registry.methods()})
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", with_blocks("python"))
@pytest.mark.usefixtures("small_world")
@pytest.mark.filterwarnings("ignore:a top-1 gate:mixtura.core.errors.MixturaWarning")  # the tour's, whose page says why
def test_python_runs_top_to_bottom(page):
    namespace = {"__name__": page.stem}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_recipes_parse(page):
    for block in blocks(page, "yaml"):
        recipe = Recipe.from_dict(yaml.safe_load(block))
        assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_is_of_a_language_that_nobody_runs(page):
    assert {kind for _, kind, _ in FENCE.findall(text(page))} <= LANGUAGES
    assert text(page).count("```") == 2 * len(FENCE.findall(text(page)))


def test_readme_names_every_command_and_no_other():
    table = re.findall(r"^\| `mixtura (\w+)", text(ROOT / "README.md"), re.MULTILINE)
    assert sorted(table) == sorted(typer.main.get_command(app).commands)


def test_readme_names_every_source_and_its_license():
    readme = text(ROOT / "README.md")
    for name, source in PACKAGED.items():
        row = next(line for line in readme.splitlines() if line.startswith("|") and f"`{name}`" in line)
        assert source.license in row


def test_readme_counts_the_families_that_there_are():
    readme = text(ROOT / "README.md")
    assert f"the selection of {len(known_families())} native families as data" in readme
    assert f"({len(families._OUTSIDE)} families are refused by name)" in readme
    assert f"tried on {len(DENSE)} dense families" in readme
    tried = json.loads((ROOT / "docs" / "native_families.json").read_text(encoding="utf-8"))
    assert f"tried on {sum(not row['refused'] for row in tried.values())} native families" in readme
    *most, last = [target.family for target in TARGETS]
    assert f"export to {', '.join(most)} and {last}" in readme


def test_the_page_of_methods_has_every_card():
    page = hooks().generated("methods")
    for row in registry.methods():
        assert f"### {row.key}\n" in page
        for option in row.options:
            assert f"| `{option}` |" in page


def test_every_generated_table_that_a_page_asks_for_is_there():
    module = hooks()
    asked = {name for page in PAGES for name in module._MARKER.findall(page.read_text(encoding="utf-8"))}
    assert asked == set(module.TABLES)
    for name in asked:
        assert len(module.generated(name)) > 20


def test_an_unknown_table_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'methods'"):
        hooks().generated("method")


def test_a_table_cell_cannot_end_its_column():
    assert docs_module("markdown_table").table(("a", "b"), [("x | y", 1)]).splitlines()[-1] == r"| x \| y | 1 |"


def test_types_of_options_are_spelled_out_without_a_bar():
    page = hooks().generated("methods")
    assert "| `score` | `Literal['softmax', 'sigmoid', 'relu', 'none']` | `'softmax'` |" in page
    assert "| `renormalize` | `float or None` | `1.0` |" in page


def test_attributes_are_read_over_several_lines():
    class Documented:
        """A thing.

        Attributes:
            one: first,
                and on.
            two: second.

        Raises:
            Nothing: ever.
        """

    assert hooks().attributes(Documented) == {"one": "first, and on.", "two": "second."}
