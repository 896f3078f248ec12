"""A saved model is whole, says how to load it, and never takes the place of another by accident."""

import pytest
from transformers import AutoModelForCausalLM

from mixtura.core import OptionError
from mixtura.hf import convert
from mixtura.hf.save import save_model
from mixtura.nn import Experts, Mixture
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico


def mixture_model():
    return convert(pico("llama"), {0: Mixture(TopKRouter(32, 4), Experts(4, 32, 16))})


def test_the_card_says_how_to_load_and_holds_the_papers(tmp_path):
    out = save_model(
        mixture_model(),
        tmp_path / "a folder with ünicode",
        parents=("pico/llama",),
        receipts={"upcycle": {"max_logit_difference": 0.0}},
        recipe={"train": {"steps": 3}},
        numbers={"bits per byte": 1.25},
        command="mixtura train recipe.yaml out",
    )
    card = (out / "README.md").read_text()
    first = card.split("---\n")[2].strip().splitlines()[0]
    assert "`import mixtura.hf`" in first
    for part in (
        "pico/llama",
        "mixtura train recipe.yaml out",
        "| bits per byte | 1.25 |",
        '"max_logit_difference": 0.0',
    ):
        assert part in card
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "mixtura"


def test_a_native_model_needs_no_mixtura(tmp_path):
    card = (save_model(pico("llama"), tmp_path / "out") / "README.md").read_text()
    assert "it is a stock `llama` and needs no mixtura" in card


def test_a_folder_with_something_in_it_is_not_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OptionError, match="new or empty folder"):
        save_model(pico("llama"), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_the_old_model_and_no_rest(tmp_path):
    out = save_model(pico("llama"), tmp_path / "out")
    before = sorted(file.name for file in out.iterdir())
    model = mixture_model()

    def full(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    model.save_pretrained = full
    with pytest.raises(OSError, match="No space left"):
        save_model(model, out, overwrite=True)
    assert sorted(file.name for file in out.iterdir()) == before
    assert [folder.name for folder in tmp_path.iterdir()] == ["out"]
