import inspect
import json
import logging

import pytest

from mixtura.core import registry
from mixtura.core.errors import OptionError, UnknownNameError
from mixtura.core.registry import method


@pytest.fixture
def table(monkeypatch):
    """A table of our own, so that no test leaves a method behind; loading again fills it."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    registry.load_all.cache_clear()
    yield registry._TABLE
    registry.load_all.cache_clear()


class EntryPoint:
    def __init__(self, name, load):
        self.name, self.load = name, load


def with_plugins(monkeypatch, *entries):
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: entries)


def test_a_class_keeps_its_arguments_as_json(table):
    @method("boxes", role="test")
    class Boxes:
        def __init__(self, size, *, color="red"):
            self.size, self.color = size, color

    made = Boxes(3, color="blue")
    config = json.loads(json.dumps(made.method_config))
    assert config == {"method": "boxes", "size": 3, "color": "blue"}
    assert vars(registry.build(config)) == vars(made)
    assert str(inspect.signature(Boxes)) == "(size, *, color='red')"


def test_a_subclass_that_is_not_registered_has_no_configuration(table):
    @method("base", role="test")
    class Base:
        def __init__(self, size=1):
            self.size = size

    class Other(Base):
        pass

    @method("derived", role="test")
    class Derived(Base):
        def __init__(self, length=2):
            super().__init__(size=length)

    assert not hasattr(Other(), "method_config")
    assert Derived().method_config == {"method": "derived", "length": 2}


def test_a_key_is_taken_once(table):
    def first():
        pass

    def second():
        pass

    method("once", role="test")(first)
    method("once", role="test")(first)
    with pytest.raises(OptionError, match=r"method 'once' is taken by .*test_registry"):
        method("once", role="test")(second)
    second.__qualname__, second.__module__ = first.__qualname__, "elsewhere"
    with pytest.raises(OptionError, match="cannot register elsewhere"):
        method("once", role="test")(second)


def test_calling_names_the_nearest_option_and_the_missing_one(table):
    @method("draw", role="test")
    def draw(width, *, color="red"):
        return width, color

    row = registry.get("draw")
    assert row(2, color="blue") == (2, "blue")
    with pytest.raises(OptionError, match="unknown option of method 'draw' 'colour'; did you mean 'color'"):
        row(2, colour="blue")
    with pytest.raises(OptionError, match="method 'draw': missing a required argument: 'width'"):
        row(color="blue")


def test_unknown_method_names_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown method 'topk-softmx'; did you mean 'topk-softmax'"):
        registry.get("topk-softmx")


def test_build_needs_a_method():
    with pytest.raises(OptionError, match=r"needs the entry 'method', got \['dim'\]"):
        registry.build({"dim": 3})


def test_a_plug_in_is_loaded(table, monkeypatch):
    with_plugins(monkeypatch, EntryPoint("theirs", lambda: method("theirs", role="test")(lambda: 7)))
    assert registry.build({"method": "theirs"}) == 7
    assert [row.key for row in registry.methods("test")] == ["theirs"]


def test_a_plug_in_that_fails_is_logged_and_not_fatal(table, monkeypatch, caplog):
    def fail():
        raise RuntimeError("no such thing")

    with_plugins(
        monkeypatch, EntryPoint("broken", fail), EntryPoint("whole", lambda: method("whole", role="test")(fail))
    )
    with caplog.at_level(logging.WARNING, logger="mixtura"):
        keys = [row.key for row in registry.methods()]
    assert "whole" in keys
    assert "topk-softmax" in keys
    assert "plug-in broken of group mixtura.plugins could not be loaded: no such thing" in caplog.text


def test_methods_come_by_key_and_role():
    keys = [row.key for row in registry.methods()]
    assert keys == sorted(keys)
    assert {row.role for row in registry.methods("balance")} == {"balance"}


@pytest.mark.parametrize("row", registry.methods(), ids=lambda row: row.key)
def test_every_method_has_a_card_and_a_schema(row):
    assert row.summary.endswith((".", ":")) or len(row.summary) > 10
    assert row.module.startswith("mixtura.")
    for name, parameter in row.options.items():
        assert parameter.kind is not inspect.Parameter.VAR_POSITIONAL, name
        assert parameter.annotation is not inspect.Parameter.empty, name
