"""A trace is whole in memory and on disk, or an error."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixtura.core import FileFormatError, OptionError, ShapeError, UnknownNameError
from mixtura.core.routing import check
from mixtura.traces import Trace
from mixtura.traces.trace import COLUMNS
from traces.traces import made, random


def same(one, other):
    assert one.meta == other.meta
    for name, dtype in COLUMNS.items():
        assert getattr(one, name).dtype == getattr(other, name).dtype == dtype, name
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("trace", [random(), Trace.empty(), made([[0]], E=1, domains=["Zürich / <b>"])])
def test_saved_and_loaded_bit_equal(trace, tmp_path):
    same(Trace.load(trace.save(tmp_path / "deep" / "t.safetensors")), trace)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(kept, tmp_path):
    path = random().save(tmp_path / "t.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FileFormatError, match=r"t\.safetensors"):
        Trace.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "model"}, "no trace"),
        ({"version": "2"}, "upgrade mixtura"),
        ({"version": "one"}, "upgrade mixtura"),
        ({"meta": "{"}, "not a whole trace"),
        ({"meta": "{}"}, "not a whole trace"),
        ({"meta": json.dumps({"layers": ["3"], "experts": [5], "domains": ["a"]})}, "column layer"),
    ],
)
def test_another_kind_or_version_is_refused(change, message, tmp_path):
    path = tmp_path / "t.safetensors"
    metadata = {"kind": "mixtura-trace", "version": "1", "meta": json.dumps(random().meta)}
    save_file(random().columns, path, {**metadata, **change})
    with pytest.raises(FileFormatError, match=message):
        Trace.load(path)


def test_a_missing_column_or_file_is_refused(tmp_path):
    path = random().save(tmp_path / "t.safetensors")
    columns = load_file(path)
    del columns["weight"]
    save_file(columns, path, {"kind": "mixtura-trace", "version": "1", "meta": json.dumps(random().meta)})
    with pytest.raises(FileFormatError, match="weight"):
        Trace.load(path)
    with pytest.raises(FileFormatError, match="absent"):
        Trace.load(tmp_path / "absent")


def test_columns_must_fit():
    trace = random()
    with pytest.raises(ShapeError, match="equal lengths"):
        Trace(**{**trace.columns, "call": trace.call[1:]}, meta=trace.meta)
    with pytest.raises(ShapeError, match="expert must lie"):
        Trace(**{**trace.columns, "expert": trace.expert + 1}, meta=trace.meta)


def test_selections_equal_a_loop():
    trace = random()
    rows = range(len(trace))
    wanted = {
        "of_layer": ([i for i in rows if trace.layer[i] == 1], trace.of_layer("7")),
        "of_domain": ([i for i in rows if trace.domain[i] == 2], trace.of_domain("c")),
        "counted": ([i for i in rows if trace.valid[i]], trace.counted()),
    }
    for name, (indices, selected) in wanted.items():
        same(selected, trace.select(np.asarray(indices))), name
    with pytest.raises(UnknownNameError, match="did you mean '7'"):
        trace.of_layer("77")
    with pytest.raises(UnknownNameError, match="unknown domain"):
        trace.of_domain("d")


def test_routing_gives_the_decisions_back():
    trace = random()
    routing = check(trace.routing("7"))
    rows = trace.of_layer("7")
    assert routing.num_experts == 5
    assert routing.indices_TK.reshape(-1).tolist() == rows.expert.tolist()
    assert np.array_equal(routing.weights_TK.reshape(-1), rows.weight)


def test_joined_traces_count_on_and_join_domains_by_name():
    one, other = random(domains=("a", "b")), random(seed=1, domains=("b", "z"))
    joined = Trace.concat([one, other, one])
    n = len(one)
    assert joined.domains == ["a", "b", "z"]
    assert [int(joined.call[i]) for i in (0, n, 2 * n)] == [0, 1, 2]
    assert [int(joined.sequence[i]) for i in (0, n, 2 * n)] == [0, 1, 2]
    names = np.array([*joined.domains, "none"])[joined.domain[n : 2 * n]]
    assert names.tolist() == np.array([*other.domains, "none"])[other.domain].tolist()
    assert np.array_equal(joined.expert[n : 2 * n], other.expert)
    same(Trace.concat([one]), one)


def test_unlike_traces_are_not_joined():
    with pytest.raises(OptionError, match="same layers"):
        Trace.concat([random(), random(E=6)])
    with pytest.raises(OptionError, match="at least one"):
        Trace.concat([])
