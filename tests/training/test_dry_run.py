"""A dry run counts what the built model has."""

import pytest
import torch

from mixtura.core.errors import FileFormatError, OptionError
from mixtura.hf.count import count_parameters
from mixtura.training.dry_run import dry_run, format_dry_run
from mixtura.training.parameters import freeze_all_but
from mixtura.training.recipe import Recipe
from mixtura.training.start import starting_point
from pico import DENSE, pico
from training.byte_tokenizer import VOCABULARY_SIZE, byte_tokenizer

UPCYCLE = {"method": "sparse-upcycling", "layers": [1, 2], "copies": 3, "shards": 2, "k": 2}


def recipe(model, upcycle=None, parameters="mixtures", **train):
    values = {
        "model": str(model),
        "data": {"domains": ["a"], "sequence_length": 16},
        "train": {"steps": 5, "batch_size": 2, "parameters": parameters, **train},
        "upcycle": upcycle,
    }
    return Recipe.from_dict(values)


def saved(tmp_path, family, **options):
    pico(family, **options).save_pretrained(tmp_path / family)
    byte_tokenizer().save_pretrained(tmp_path / family)
    return tmp_path / family


@pytest.mark.parametrize("family", sorted(DENSE))
def test_counts_equal_the_built_model(tmp_path, family):
    the_recipe = recipe(saved(tmp_path, family), UPCYCLE)
    numbers = dry_run(the_recipe)
    model, _, receipts = starting_point(the_recipe)
    trained = freeze_all_but(model, the_recipe.train)
    counts = count_parameters(model)
    assert numbers["parameters"] == counts.total
    assert numbers["active_parameters"] == counts.active == receipts["upcycle"]["active_parameters"]["after"]
    assert numbers["trainable_parameters"] == sum(p.numel() for p in trained.values())
    assert numbers["tokens"] == 5 * 2 * 16


def test_flops_of_a_llama_by_hand(tmp_path):
    """D 32, F 48, 4 heads of 8, 2 of keys and values, 3 layers, V 64."""
    numbers = dry_run(recipe(saved(tmp_path, "llama"), parameters="feed-forward:1"))
    attention, feed_forward, norms = 32 * 32 * 2 + 2 * 32 * 16, 3 * 32 * 48, 2 * 32
    layer = 2 * (attention + feed_forward + norms) + 4 * 32 * 16 / 2
    forward = 3 * layer + 2 * 32 + 2 * 64 * 32
    assert numbers["forward_flops_per_token"] == forward
    backward = 2 * feed_forward + (forward - 2 * 64 * 32) * 2 / 3 + 2 * 64 * 32
    assert numbers["training_flops_per_token"] == pytest.approx(forward + backward, abs=1)
    assert numbers["training_flops"] == numbers["training_flops_per_token"] * numbers["tokens"]


def test_sparse_experts_cost_what_is_active(tmp_path):
    """Copies beyond the chosen one add parameters and no work but the router's."""
    model = saved(tmp_path, "llama")
    few, many = (dry_run(recipe(model, {**UPCYCLE, "copies": copies})) for copies in (2, 8))
    routers = 2 * (6 * 2) * 32  # two layers, six copies of two shards, D 32
    assert many["forward_flops_per_token"] - few["forward_flops_per_token"] == 2 * routers
    assert many["parameters"] - few["parameters"] == 2 * 6 * 3 * 32 * 48 + routers
    assert many["memory_bytes"]["optimizer"] > few["memory_bytes"]["optimizer"]


def test_memory_by_part(tmp_path):
    numbers = dry_run(recipe(saved(tmp_path, "llama"), parameters="all"))
    memory = numbers["memory_bytes"]
    assert memory["weights"] == memory["gradients"] == memory["optimizer"] // 2 == 4 * numbers["parameters"]
    assert memory["logits"] == 3 * 4 * 2 * 16 * 64
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")


def test_nothing_is_built(tmp_path):
    from mixtura.training.blank import blank_model

    model = blank_model(recipe(saved(tmp_path, "gpt2"), UPCYCLE))
    assert {p.device for p in model.parameters()} == {torch.device("meta")}


def test_lines_for_people(tmp_path):
    text = format_dry_run(dry_run(recipe(saved(tmp_path, "llama", vocab_size=VOCABULARY_SIZE), UPCYCLE)))
    assert [line.split("  ")[0] for line in text.splitlines()] == [
        "parameters",
        "active a token",
        "trained",
        "tokens",
        "FLOPs a token",
        "FLOPs in all",
        "memory, estimated",
    ]


def test_what_does_not_fit_is_named(tmp_path):
    model = saved(tmp_path, "llama")
    with pytest.raises(OptionError, match="has none; upcycle it"):
        dry_run(recipe(model))
    with pytest.raises(OptionError, match="did you mean 'copies'"):
        dry_run(recipe(model, {"method": "sparse-upcycling", "copys": 2}))
    with pytest.raises(OptionError, match="k must be a multiple of shards"):
        dry_run(recipe(model, {**UPCYCLE, "k": 3}))
    with pytest.raises(FileFormatError, match="cannot be read"):
        dry_run(recipe(tmp_path / "missing", UPCYCLE))
