"""Recipes: what is read, and how each mistake is named."""

import pytest

from mixtura.core.errors import FileFormatError, OptionError
from mixtura.training.recipe import Recipe

PLAIN = {"model": "smollm2-135m", "data": {"domains": ["a", "b"]}, "train": {"steps": 8}}


def with_field(path, value):
    values = {**PLAIN, "data": dict(PLAIN["data"]), "train": dict(PLAIN["train"])}
    *sections, name = path.split(".")
    (values[sections[0]] if sections else values)[name] = value
    return values


def test_defaults_and_round_trip(tmp_path):
    recipe = Recipe.from_dict(PLAIN)
    assert recipe.data.domains == {"a": 1.0, "b": 1.0}
    assert recipe.training_tokens == 8 * 4 * 256
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "recipe.yaml") == recipe == Recipe.from_dict(recipe.to_dict())


def test_yaml_floats_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: m\ndata: {domains: {a: 1}}\ntrain: {steps: 2, learning_rate: 4e-4}\nbalance: {load-balancing: 1e-2}\n"
    )
    recipe = Recipe.load(path)
    assert recipe.train.learning_rate == 4e-4
    assert recipe.balance == {"load-balancing": 0.01}
    assert recipe.data.domains == {"a": 1.0}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.step", 3, r"unknown field 'train.step'; did you mean 'train.steps'"),
        ("modle", "x", "unknown field 'modle'; did you mean 'model'"),
        ("train.steps", 0, "train.steps must be above 0 and finite, got 0"),
        ("train.steps", "many", "train.steps must be a whole number, got 'many'"),
        ("train.steps", True, "train.steps must be a whole number, got True"),
        ("train.steps", 1.5, "train.steps must be a whole number, got 1.5"),
        ("train.learning_rate", "fast", "train.learning_rate must be a number, got 'fast'"),
        ("train.learning_rate", float("nan"), "train.learning_rate must be above 0"),
        ("train.learning_rate", -1, "train.learning_rate must be above 0"),
        ("train.router_learning_rate", -1, "train.router_learning_rate must be at least 0"),
        ("train.schedule", "linear", "train.schedule must be one of 'cosine', 'constant', got 'linear'"),
        ("train.precision", "fp8", "train.precision must be one of 'float32', 'bfloat16'"),
        (
            "train.parameters",
            "mlp",
            "train.parameters must be 'mixtures', 'all', 'feed-forward:FIRST-LAST' or roles, got 'mlp': unknown role",
        ),
        ("train.parameters", "router", "did you mean 'routers'"),
        ("train.parameters", "routers, experts[", "a role is written as"),
        ("train.parameters", "feed-forward:5-2", "train.parameters must be"),
        ("train.warmup", 8, "train.warmup must be below train.steps = 8, got 8"),
        ("data.sequence_length", 1, "data.sequence_length must be at least 2"),
        ("data.domains", {"a": 0}, r"data.domains.a must be above 0"),
        ("data.domains", {"a": "lots"}, r"data.domains.a must be a number"),
        ("data.domains", [], "data.domains must name at least one domain"),
        ("data.domains", "a", "data.domains must be a mapping, got 'a'"),
        ("data", None, "data must be a mapping of fields"),
        ("seed", -1, "seed must be at least 0"),
        ("balance", {"load-balancin": 1}, "unknown method of balance 'load-balancin'; did you mean 'load-balancing'"),
        ("balance", {"topk-softmax": 1}, "unknown method of balance 'topk-softmax'"),
        ("upcycle", [], "upcycle must be a mapping"),
    ],
)
def test_mistakes_are_named_by_their_path(path, value, message):
    with pytest.raises(OptionError, match=message):
        Recipe.from_dict(with_field(path, value))


def test_missing_fields_are_named():
    with pytest.raises(OptionError, match=r"train.steps is missing"):
        Recipe.from_dict({**PLAIN, "train": {}})
    with pytest.raises(OptionError, match="model is missing"):
        Recipe.from_dict({})


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a", "must be a mapping"), ("a: [", "is no YAML"), ("!!python/object:os.system {}", "is no YAML")],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(FileFormatError, match=message):
        Recipe.load(tmp_path / "recipe.yaml")
    with pytest.raises(FileFormatError, match="cannot be read"):
        Recipe.load(tmp_path / "missing.yaml")


def test_layers_of_the_dense_baseline():
    recipe = Recipe.from_dict(with_field("train.parameters", "feed-forward:2-4"))
    assert recipe.train.feed_forward_layers == [2, 3, 4]
    assert Recipe.from_dict(with_field("train.parameters", "feed-forward:3")).train.feed_forward_layers == [3]


def test_roles_are_named_by_comma():
    recipe = Recipe.from_dict(with_field("train.parameters", "layers[24:30].experts[4:8], routers"))
    assert recipe.train.roles == ["layers[24:30].experts[4:8]", "routers"]
    assert recipe.train.feed_forward_layers == []
