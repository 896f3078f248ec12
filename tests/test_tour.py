"""The tour on a pico model and a text of two domains: every step for real, in seconds."""

import json

import pytest

from mixtura import tour
from mixtura.core import OptionError
from mixtura.data import Corpus
from pico import pico
from training.byte_tokenizer import byte_tokenizer


@pytest.fixture
def dense(tmp_path):
    folder = tmp_path / "dense"
    tokenizer = byte_tokenizer()
    pico("llama", vocab_size=len(tokenizer), num_hidden_layers=6).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two domains of text made here, and short sequences."""
    texts = {
        "words": [f"{i} one two three four five six seven " * 30 for i in range(12)],
        "numbers": [f"{i} 1 2 3 4 5 6 7 8 9 10 11 12 13 14 " * 30 for i in range(12)],
    }
    corpus = Corpus.split(texts, skipped={"man-de": "no network"})
    monkeypatch.setattr("mixtura.tour_steps.Corpus.load", lambda: corpus)
    monkeypatch.setitem(tour.DATA, "sequence_length", 32)
    monkeypatch.setitem(tour.DATA, "held_out_tokens", 128)
    monkeypatch.setitem(tour.TRAIN, "warmup", 1)


def test_every_step_is_done_and_summed_up(dense, tmp_path):
    out = tmp_path / "out"
    summary = tour.run_tour(out, model=str(dense), steps=4, progress=False)
    assert summary == json.loads((out / "summary.json").read_text())
    assert set(summary["bits_per_byte"]) == {"base", "dense", "mixture"}
    for row in summary["bits_per_byte"].values():
        assert set(row) == {"words", "numbers", "mean"}
    active = summary["active_parameters"]
    routers = 6 * 4 * 32
    assert active["base"] == active["dense"] == active["mixture"] - routers
    assert summary["receipts"]["upcycle"]["max_logit_difference"] < 1e-4
    assert summary["receipts"]["reload"]["max_logit_difference"] == 0
    assert summary["receipts"]["export"]["family"] == "qwen2_moe"
    assert summary["receipts"]["export"]["max_logit_difference_without_mixtura"] < 1e-6
    assert summary["tokens_trained"] == 4 * 4 * 32
    assert summary["skipped_domains"] == {"man-de": "no network"}
    assert summary["bits_per_byte"]["dense"]["mean"] < summary["bits_per_byte"]["base"]["mean"]
    report = (out / "report.html").read_text()
    assert f"{summary['bits_per_byte']['mixture']['mean']:.4f}" in report
    assert "Without man-de: no network" in report
    assert "report.html" in tour.table(summary)
    written = {path.name for path in out.iterdir()}
    assert written == {"dense", "mixture", "export", "report.html", "summary.json", "trace.safetensors"} | {
        "dense.history.json",
        "mixture.history.json",
        "tour.json",
    }


def test_a_killed_tour_goes_on_to_the_same_numbers(dense, tmp_path, monkeypatch):
    whole = tour.run_tour(tmp_path / "whole", model=str(dense), steps=4, progress=False)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mixtura.tour_steps.fit_router_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            tour.run_tour(tmp_path / "out", model=str(dense), steps=4, progress=False)
    assert not (tmp_path / "out" / "summary.json").exists()
    resumed = tour.run_tour(tmp_path / "out", model=str(dense), steps=4, progress=False)
    assert resumed["bits_per_byte"] == whole["bits_per_byte"]


def test_a_folder_of_something_else_is_refused(dense, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("keep")
    with pytest.raises(OptionError, match="holds other things"):
        tour.run_tour(tmp_path / "mine", model=str(dense), steps=4, progress=False)
    assert (tmp_path / "mine" / "note.txt").read_text() == "keep"


def test_a_finished_tour_is_replaced_and_what_lies_beside_it_stays(dense, tmp_path):
    out = tmp_path / "out"
    first = tour.run_tour(out, model=str(dense), steps=1, progress=False)
    (out / "note.txt").write_text("keep")
    again = tour.run_tour(out, model=str(dense), steps=1, progress=False)
    assert again["bits_per_byte"] == first["bits_per_byte"]
    assert (out / "note.txt").read_text() == "keep"


def test_a_model_that_no_stock_family_can_hold_is_toured_all_the_same(tmp_path):
    folder, tokenizer = tmp_path / "gpt2", byte_tokenizer()
    pico("gpt2", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    summary = tour.run_tour(tmp_path / "out", model=str(folder), steps=2, progress=False)
    assert summary["receipts"]["export"]["family"] is None
    assert "gpt2" in summary["receipts"]["export"]["reason"]
    assert "export" not in summary["paths"]
    assert summary["receipts"]["upcycle"]["layers"] == [0, 1, 2]


def test_steps_below_one_are_refused(dense, tmp_path):
    with pytest.raises(OptionError, match="steps must be at least 1, got 0"):
        tour.run_tour(tmp_path / "out", model=str(dense), steps=0)
    assert not (tmp_path / "out").exists()
