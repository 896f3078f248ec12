"""The page of speed and its plots show what the files of results say."""

import importlib
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mixtura.bench.measuring import Outcome, Timing
from mixtura.bench.report import Case, Report

ROOT = Path(__file__).parents[2]
RATES = {"moe/bf16/L5": {}, "moe/int4/L5": {"mixtura": 0.9, "llama.cpp": 0.8}}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("tables")
    for name in ("tables", "plots"):
        del sys.modules[name]


def outcome(foreign=0.0, **seconds):
    return Outcome({who: Timing(value, 0.01, 7) for who, value in seconds.items()}, {}, foreign)


@pytest.fixture
def results(tmp_path):
    """Some of each benchmark that has a plot."""
    layer = Report("layer", 2, tmp_path / "layer.json")
    times = {"transformers eager": 0.004, "transformers grouped_mm": 0.002, "zentorch": 0.0005, "mixtura": 0.001}
    layer.add(Case("A/bf16/T1", outcome(**times)))
    layer.add(Case("A/bf16/T512", outcome(foreign=0.5, **{**times, "mixtura": 0.00025})))
    decode = Report("decode", 2, tmp_path / "decode.json")
    for name, cosines in RATES.items():
        times = {"mixtura": 0.02, "llama.cpp": 0.01, "transformers, bf16" if cosines else "transformers": 0.1}
        beside = ("transformers, bf16",) if cosines else ()
        decode.add(Case(name, outcome(**times), "tok/s", least=0.005, cosines=cosines, beside=beside))
    return tmp_path


def test_the_page_and_its_plots_are_those_of_the_results(tables):
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for name, content in tables.written(ROOT / "benchmarks" / "results", text).items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == content, "run: python benchmarks/tables.py"


def test_what_stands_before_is_kept(tables, results, tmp_path_factory):
    first = tables.written(results, "# Speed\n\nwords\n")["speed.md"]
    assert first.startswith("# Speed\n\nwords\n\n## Measured\n\nEverything here")
    assert tables.written(results, first)["speed.md"] == first
    assert tables.written(tmp_path_factory.mktemp("empty"), "# Speed\n") == {"speed.md": "# Speed\n"}


def test_cells_behind_the_best_peer_are_named(tables, results):
    page = tables.written(results, "# Speed\n")["speed.md"]
    layer, decode = page.split("### Decode steps")
    assert "Behind the best peer: `A/bf16/T1` (0.50)." in layer
    assert "| `A/bf16/T512`* |" in layer
    assert "Behind the best peer: `moe/bf16/L5` (0.50), `moe/int4/L5` (0.50)." in decode
    assert decode.index("moe/bf16") < decode.index("With 8 and 4 bits") < decode.index("0.90000 / 0.80000")


def test_plots_draw_every_value(tables, results):
    drawn = tables.written(results, "# Speed\n")
    layer = ElementTree.fromstring(drawn["speed-layer.svg"])
    circles = [one.attrib for one in layer.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == 6  # mixtura, zentorch and the best of transformers, at two numbers of tokens
    assert [one["fill"] for one in circles].count("#fff") == 3
    of_ours = [float(one["cy"]) for one in circles if one["stroke"] == "#00796b"]
    peer = [float(one["cy"]) for one in circles if one["stroke"] == "#e65100"]
    stock = [float(one["cy"]) for one in circles if one["stroke"] == "#8d8d8d"]
    step = stock[0] - of_ours[0]  # twice as fast as the best of transformers
    assert stock[0] - peer[0] == pytest.approx(2 * step, abs=0.2)
    assert stock[1] - of_ours[1] == pytest.approx(3 * step, abs=0.2)
    decode = ElementTree.fromstring(drawn["speed-decode.svg"])
    widths = [
        float(one.get("width")) for one in decode.iter("{http://www.w3.org/2000/svg}rect") if one.get("height") == "13"
    ]
    assert widths == pytest.approx([460 / 1.1 * part for part in (0.25, 0.05, 0.5, 0.25, 0.5)], abs=0.1)
    assert "50 tok/s" in drawn["speed-decode.svg"]
