"""The page of systems: how a system stands is computed, never typed, and no link leads nowhere."""

import dataclasses
import json
import re

import pytest

from docs.made_up import result
from docs.pages import ROOT, docs_module, text
from mixtura.core import registry
from mixtura.core.errors import OptionError
from mixtura.evidence.scripts import known_results

ROWS = json.loads(text(ROOT / "docs" / "systems.json"))
FIELDS = {"key", "title", "family", "scope", "source", "what", "at", "missing"}


def page():
    return docs_module("hooks").generated("systems")


def line(key, told):
    (found,) = [row for row in told.splitlines() if row.startswith(f"| **{key}**")]
    return found


def system(**options):
    fields = {"key": "new", "title": "T", "family": "routing", "scope": "full", "source": "here", "what": "Something."}
    return docs_module("systems_page").System(**{**fields, **options})


def test_the_file_types_no_state():
    for row in ROWS:
        assert set(row) <= FIELDS
        assert row["what"].endswith((".", "?"))
        assert row["title"].strip()
        assert row["source"].strip()
        assert row["what"] != row["title"]


def test_every_row_has_its_line_once():
    told = page()
    for row in ROWS:
        assert row["what"] in line(row["key"], told)


def test_every_method_has_a_line_with_its_card():
    told = page()
    for row in registry.methods():
        assert f"built: [card](methods.md#{row.key})" in line(row.key, told)


def test_every_result_has_a_line_with_its_verdict():
    told = page()
    for key, one in known_results().items():
        assert f"claim: [{one.verdict}](evidence.md#{key})" in line(key, told)


def test_the_head_counts_the_lines():
    told = page()
    count = {
        name: int(number)
        for number, name in re.findall(r"(\d+) (built|in part|tested|planned|reference)", told.splitlines()[0])
    }
    parts = told.partition("## Beside the list")[0].splitlines()
    lines = [row.rsplit(" | ", 1)[1] for row in parts if row.startswith("| **")]
    assert len(lines) == len(ROWS)
    assert count["built"] == sum(row.startswith("built") for row in lines)
    assert count["in part"] == sum(row.startswith("in part") for row in lines)
    assert count.get("tested", 0) == sum(row.startswith("tested") for row in lines)
    assert count["reference"] == sum(row.startswith("reference") for row in lines)


def test_a_system_stands_as_what_is_there_says():
    def standing(**options):
        return docs_module("systems_page").standing(system(**options), {"expert-choice": 1, "tried": 1})

    density = ["mixtura.density.GaussianMixture"]
    assert standing() == "planned"
    assert standing(scope="recipe") == "planned, as a recipe"
    assert standing(scope="reference") == "reference"
    assert standing(key="tried", scope="recipe") == "tested"
    assert standing(key="expert-choice") == "built"
    assert standing(at=density) == "built"
    assert standing(at=density, missing="half") == "in part"


def test_a_page_of_three():
    module = docs_module("systems_page")
    rows = [system(key="expert-choice", source="arXiv:1"), system(key="other", family="agents")]
    results = {key: result(key, verdict="holds") for key in ("expert-choice", "a-claim")}
    told = module.systems_page(results, rows)
    assert told.startswith("**2 systems**: 1 built; 1 planned. 1 with evidence.\n\n## Routing\n")
    assert line("expert-choice", told).endswith(
        "[T](https://arxiv.org/abs/1) | Something. | built: [card](methods.md#expert-choice)"
        "<br>claim: [holds](evidence.md#expert-choice) |"
    )
    assert line("other", told).endswith("T, here | Something. | planned |")
    assert line("a-claim", told).endswith("| Experts that choose are better. | claim: [holds](evidence.md#a-claim) |")


def test_rows_are_checked(tmp_path):
    for wrong in ({"family": "routes"}, {"scope": "built"}, {"at": ["mixtura.density.GaussianMixtur"]}):
        with pytest.raises(OptionError, match="'new'"):
            system(**wrong)
    row = dataclasses.asdict(system())
    (tmp_path / "twice.json").write_text(json.dumps([row, row]), encoding="utf-8")
    with pytest.raises(OptionError, match="twice: new"):
        docs_module("systems_page").read_systems(tmp_path / "twice.json")


def test_no_link_leads_nowhere():
    hooks = docs_module("hooks")
    reference = re.findall(r"^::: (\S+)$", text(ROOT / "docs" / "reference.md"), re.MULTILINE)
    anchors = {
        name: set(re.findall(r"^##+ (\S+)$", hooks.generated(name), re.MULTILINE)) for name in ("methods", "evidence")
    }
    for target, anchor in re.findall(r"\]\((\w+)\.md#([^)]+)\)", page() + hooks.generated("methods")):
        if target == "reference":
            assert anchor.rpartition(".")[0] in reference
        else:
            assert anchor in anchors[target]
    assert not re.findall(r"\]\((?!https://|\w+\.md#)", page())
