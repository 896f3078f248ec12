"""The report is one file that asks nothing of the network, says all numbers given, and no text can break it."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mixtura.core import OptionError
from mixtura.traces import metrics
from mixtura.traces.report import write_report
from mixtura.traces.report_passage import passage_of, pieces
from mixtura.traces.report_results import results_table, verdict
from mixtura.traces.report_svg import bars, color, heat_map, lines, luminance
from mixtura.traces.trace import Trace
from traces.traces import made, random

VOID = {"meta", "input", "br", "img", "link", "hr"}
TABLE = {
    "base": {"man-de": 1.5, "code": 1.25},
    "dense": {"man-de": 1.40004, "code": 1.20111},
    "mixture": {"man-de": 1.39, "code": 1.2125},
}
NASTY = '</script><script src="http://evil.example/x.js"></script><b onclick="x">&amp;'


class Words:
    """A tokenizer whose tokens are given strings."""

    def __init__(self, words):
        self.words = words

    def decode(self, ids, *, clean_up_tokenization_spaces):
        assert clean_up_tokenization_spaces is False
        return "".join(self.words[i] for i in ids)


class Utf8(Words):
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, *, clean_up_tokenization_spaces):
        return bytes(ids).decode("utf-8", errors="replace")


class Page(HTMLParser):
    """Elements, attributes and texts; fails on tags that do not close."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self):
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def full(tmp_path, **changes):
    words = ["the ", "</script>", "<b>", "ü\n", "&amp;", '"', "x", "y", "z"]
    options = {
        "trace": random(T=30, domains=("man-de", NASTY, "c")),
        "tokenizer": Words(words),
        "table": TABLE,
        "curves": {"mixture": [(1, 3.5), (2, 3.125), (3, 2.875)], "dense": [(1, 3.4), (2, 3.3), (3, float("nan"))]},
        "recipe": {"copies": 4, "title": NASTY},
        "versions": {"torch": "2.13.0", NASTY: "1"},
        "notes": [NASTY, "Equal tokens."],
        "receipts": {"upcycle": {"max_logit_difference": 2.3e-05, "layers": [24, 25], "note": NASTY}},
        **changes,
    }
    return write_report(tmp_path / "report.html", **options).read_text("utf-8")


def test_nothing_comes_from_elsewhere(tmp_path):
    page = Page(full(tmp_path))
    for tag, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "xlink:href"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert "url(" not in (attributes.get("style") or "")
    for tag, text in page.texts:
        if tag in ("style", "script"):
            assert "http" not in text
            assert "url(" not in text
            assert "@import" not in text
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_readable_on_a_phone_and_in_the_dark(tmp_path):
    html = full(tmp_path)
    assert any("width=device-width" in (a.get("content") or "") for a in Page(html).all("meta"))
    assert "prefers-color-scheme: dark" in html
    assert "overflow-x: auto" in html


def test_every_number_is_there(tmp_path):
    text = Page(full(tmp_path)).text
    for row in TABLE.values():
        for value in [*row.values(), sum(row.values()) / 2]:
            assert f"{value:.4f}" in text
    for wanted in ("−0.0100", "+0.0114", "2.3e-05", "upcycle.max_logit_difference", "[24, 25]", "2.13.0", "copies: 4"):
        assert wanted in text
    assert "last 2.875" in text
    assert "last 3.3" in text


def test_no_text_breaks_out(tmp_path):
    page = Page(full(tmp_path))
    assert len(page.all("script")) == 2
    assert page.all("b") == [{}] * 5
    assert page.text.count(NASTY) >= 4
    json.loads(next(text for tag, text in page.texts if tag == "script"))


def test_every_chart_says_what_it_shows(tmp_path):
    page = Page(full(tmp_path))
    charts = page.all("svg")
    assert len(charts) == 1 + 1 + 5 + 2
    for chart in charts:
        assert chart["role"] == "img"
        assert len(chart["aria-label"]) > 10


@pytest.mark.parametrize(
    "missing", ["table", "curves", "recipe", "versions", "notes", "receipts", "tokenizer", "trace"]
)
def test_what_is_not_given_has_no_section(missing, tmp_path):
    titles = {
        "table": "Results", "curves": "Training", "recipe": "Recipe", "versions": "Versions", "notes": "Notes",
        "receipts": "Receipts", "tokenizer": "Text", "trace": "Load",
    }  # fmt: skip
    heads = [
        [t for tag, t in Page(full(tmp_path, **c)).texts if tag == "h2"]
        for c in ({}, {missing: None if missing != "notes" else ()})
    ]
    assert titles[missing] in heads[0]
    assert titles[missing] not in heads[1]


def test_an_empty_report_and_an_empty_trace_are_pages(tmp_path):
    for options in ({}, {"trace": Trace.empty(), "tokenizer": Words([])}, {"table": {}, "curves": {"a": []}}):
        page = Page(write_report(tmp_path / "r.html", **options).read_text("utf-8"))
        assert not page.all("section")


def test_passages_are_the_first_sequence_of_each_domain_colored_by_the_first_expert(tmp_path):
    words = ["ein ", "zwei", "three"]
    one = made([[3, 1], [9, 0], [10, 10]], E=10, token_T=[0, 1, 2], layers=("4", "5"), domains=("de", "en"))
    page = Page(full(tmp_path, trace=one, tokenizer=Words(words)))
    spans = [a for a in page.all("span") if "data-at" in a]
    assert [a["class"] for a in spans] == ["t x3 u0", "t x1 u1", "t"]
    assert [a["title"] for a in spans] == ["experts 3 (0.50), 1 (0.50)", "experts 9 (0.50), 0 (0.50)", "experts none"]
    routes = json.loads(next(text for tag, text in page.texts if tag == "script"))
    assert routes["passages"][0]["experts"] == [[[3, 1], [9, 0], [None, None]]] * 2


def test_of_a_position_the_last_record_counts():
    first = made([[0], [1]], E=3, token_T=[5, 6])
    again = Trace.concat([first, made([[1], [2]], E=3, token_T=[5, 7])])
    again.sequence[:] = 0
    passage = passage_of(again, 0)
    assert passage.token_T.tolist() == [5, 7]
    assert passage.expert_LTK.tolist() == [[[1], [2]]]
    with pytest.raises(OptionError, match="one of 0, got 4"):
        passage_of(again, 4)


def test_unknown_tokens_are_left_out():
    passage = passage_of(made([[0], [1], [2]], E=3, token_T=[5, -1, 6]), 0)
    assert passage.token_T.tolist() == [5, 6]
    assert passage.expert_LTK.tolist() == [[[0], [2]]]


def test_characters_of_several_tokens_are_shown_once():
    text = "süß ☃"
    shown = list(pieces(Utf8([]), list(text.encode())))
    assert "".join(shown) == text
    assert "\ufffd" not in "".join(shown)
    assert len(shown) == len(text.encode())


@pytest.mark.parametrize(
    ("dense", "mixture", "sentence"),
    [
        (1.5, 1.4, "mixture is better than the dense model by 0.1000 bits per byte (6.67%)"),
        (1.4, 1.5, "mixture is worse than the dense model by 0.1000 bits per byte (7.14%)"),
        (1.40001, 1.40002, "mixture is as good as the dense model"),
    ],
)
def test_the_sentence_says_who_is_better(dense, mixture, sentence):
    said = verdict({"dense": {"a": dense}, "mixture": {"a": mixture}})
    assert sentence in said
    assert f"better in {int(mixture < dense - 1e-4)} of 1 domains" in said


def test_a_given_mean_is_taken_and_no_domain():
    table = {name: {**row, "mean": 9.5} for name, row in TABLE.items()}
    assert results_table(table).count("9.5000") == 3
    assert "of 2 domains" in verdict(table)
    assert verdict({"base": TABLE["base"]}) == ""


def test_differences_are_those_of_the_printed_numbers():
    table = {"dense": {"a": 1.00004}, "mixture": {"a": 0.99996}}
    cells = re.findall(r"<td[^>]*>([+−\d.]+)", results_table(table))
    assert cells == ["1.0000", "1.0000", "+0.0000"] * 2


def test_unlike_domains_are_refused(tmp_path):
    with pytest.raises(OptionError, match="same domains"):
        write_report(tmp_path / "r.html", table={"base": {"a": 1.0}, "dense": {"b": 1.0}})
    assert list(tmp_path.iterdir()) == []


def test_text_on_every_heat_color_has_contrast():
    for i in range(101):
        back, ink = color(i / 100)
        one = luminance([int(back[j : j + 2], 16) for j in (1, 3, 5)])
        other = 0.0 if ink == "#000" else 1.0
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) > 4.5


def test_heat_map_cells_are_the_values():
    svg = heat_map(np.array([[0.0, 1.5], [np.nan, 3.0]]), ["r<", "s"], ["0", "1"], title="t", x="expert", y="layer")
    assert re.findall(r"<title>([^<]*)</title>", svg) == [
        "layer r&lt;, expert 0: 0.000", "layer r&lt;, expert 1: 1.500", "layer s, expert 1: 3.000",
    ]  # fmt: skip
    assert color(1)[0] in svg
    assert "×" in svg


def test_many_layers_and_experts_stay_one_page(tmp_path):
    trace = random(T=20, E=64, K=8, layers=tuple(map(str, range(24))))
    page = Page(write_report(tmp_path / "r.html", trace=trace).read_text("utf-8"))
    assert len(page.all("details")) == 24
    assert sum("open" in a for a in page.all("details")) == 1


@pytest.mark.parametrize("points", [[(0, 2.0)], [(1, 1.0), (2, 1.0)], [(5, -1e-9), (5, 3e7)]])
def test_lines_and_bars_of_odd_ranges_are_finite(points):
    svg = lines({"a": points, "b": []}, title="t", x="x", y="y") + bars({}, title="t", x="x", y="y")
    svg += bars({"0": 0.0}, title="t", x="x", y="y", marks={"0": 0.0})
    assert not re.search("nan|inf", svg)
    assert Page(svg).all("svg")


def test_figures_are_those_of_the_metrics(tmp_path):
    trace = random(T=60)
    text = Page(write_report(tmp_path / "r.html", trace=trace).read_text("utf-8")).text
    for figure in (metrics.specialization(trace), {k: b.effective for k, b in metrics.balance(trace).items()}):
        for layer, value in figure.items():
            assert f"layer {layer}: {value:.4g}" in text
