"""What is told: rows, their ratios, files, tables."""

import json

import pytest

from mixtura.bench.measuring import Outcome, Timing
from mixtura.bench.report import Case, Report, lines, machine, markdown, own_versions
from mixtura.core.errors import MixturaError, OptionError


def case(name="B/bf16/T8", foreign=0.0, seconds=None, **options):
    seconds = seconds or {"mixtura": 0.002, "fast": 0.003, "slow": 0.006, "gemm": 1.0}
    timings = {who: Timing(value, 0.125, 7) for who, value in seconds.items()}
    return Case(name, Outcome(timings, {}, foreign), **{"limits": {"gemm": 380.0}, **options})


def by_who(rows):
    return {row["who"]: row for row in rows}


def test_a_ratio_above_one_is_better_than_the_best_peer():
    rows = by_who(case().rows())
    assert {who: row["vs_best_peer"] for who, row in rows.items()} == {"mixtura": 1.5, "fast": 1.0, "slow": 0.5}
    assert rows["mixtura"] == {
        "case": "B/bf16/T8",
        "who": "mixtura",
        "value": 2.0,
        "unit": "ms",
        "vs_best_peer": 1.5,
        "of_limit": None,
        "iqr": 0.125,
        "error": None,
    }


def test_rates_are_amounts_a_second_and_the_ratio_stays_the_same():
    rows = by_who(case(unit="tok/s", amount=8, least=0.001).rows())
    assert (rows["mixtura"]["value"], rows["mixtura"]["vs_best_peer"], rows["mixtura"]["of_limit"]) == (4000, 1.5, 0.5)
    assert rows["slow"]["of_limit"] == pytest.approx(1 / 6, rel=1e-3)


def test_contestants_that_do_something_else_are_nobodys_peer():
    assert by_who(case(beside=("fast",)).rows())["mixtura"]["vs_best_peer"] == 3.0


def test_without_peers_there_is_no_ratio():
    (row,) = case(seconds={"mixtura": 1.0}).rows()
    assert row["vs_best_peer"] is None


def test_the_file_is_whole_after_each_case(tmp_path):
    path = tmp_path / "layer.json"
    report = Report("layer", 2, path)
    report.add(case("one", left_out={"slow": "no"}, errors={"fast": 0.00123456}))
    first = json.loads(path.read_text())
    report.add(case("two", foreign=0.5))
    second = json.loads(path.read_text())
    assert second == report.to_dict()
    parts = ("kind", "clock", "date", "machine", "versions", "quiet", "limits", "rows", "left_out", "foreign")
    assert tuple(first) == parts
    assert [row["case"] for row in first["rows"]] == ["one"] * 3
    assert [row["case"] for row in second["rows"]] == ["one"] * 3 + ["two"] * 3
    assert (first["quiet"], second["quiet"]) == (True, False)
    assert first["limits"] == {"one": {"gemm": 380.0}}
    assert first["left_out"] == {"one": {"slow": "no"}}
    assert by_who(first["rows"])["fast"]["error"] == 0.001235
    assert [entry.name for entry in tmp_path.iterdir()] == ["layer.json"]


def test_cases_of_the_file_are_kept_where_they_stand_unless_timed_anew(tmp_path):
    path = tmp_path / "layer.json"
    first = Report("layer", 2, path)
    first.versions["peer"] = "1"
    for name in ("one", "two"):
        first.add(case(name, foreign=0.5, left_out={"slow": "no"}))
    second = Report("layer", 2, path, keep=True)
    second.add(case("one", seconds={"mixtura": 0.5, "gemm": 1.0}))
    second.add(case("three", foreign=0.5))
    told = json.loads(path.read_text())
    assert [(row["case"], row["who"]) for row in told["rows"]] == [
        ("one", "mixtura"),
        *((name, who) for name in ("two", "three") for who in ("mixtura", "fast", "slow")),
    ]
    assert told["rows"][0]["value"] == 500
    assert told["foreign"] == {"one": 0.0, "two": 0.5, "three": 0.5}
    assert told["left_out"] == {"two": {"slow": "no"}}
    assert told["versions"]["peer"] == "1"
    assert told["quiet"] is False


@pytest.mark.parametrize(
    ("part", "name", "wrong"),
    [
        ("versions", "torch", "1.0"),
        ("machine", "threads", 3),
        (None, "kind", "decode"),
        (None, "clock", "processor"),
    ],
)
def test_what_is_not_comparable_is_not_kept(part, name, wrong, tmp_path):
    path = tmp_path / "layer.json"
    Report("layer", 2, path).add(case())
    told = json.loads(path.read_text())
    (told[part] if part else told)[name] = wrong
    path.write_text(json.dumps(told))
    with pytest.raises(OptionError, match=f"cannot be kept: its {name} is {wrong!r}, now it is"):
        Report("layer", 2, path, keep=True)


def test_less_is_better_in_gigabytes_and_seconds():
    for unit, value in (("GB", 2.0), ("s", 2.0), ("ms", 2000.0)):
        rows = by_who(case(unit=unit, seconds={"mixtura": 2.0, "other": 3.0}, limits={}).rows())
        assert (rows["mixtura"]["value"], rows["mixtura"]["vs_best_peer"]) == (value, 1.5)


def test_unknown_quiet_is_none():
    report = Report("layer", 2)
    report.add(case(foreign=None))
    report.add(case("other"))
    assert report.to_dict()["quiet"] is None


def test_a_file_that_cannot_be_written_is_one_error(tmp_path):
    with pytest.raises((MixturaError, OSError)):
        Report("layer", 2, tmp_path).add(case())


def test_the_machine_is_described():
    told = machine(2)
    assert told["threads"] == 2
    assert told["cores"] >= 1
    assert told["processor"]
    assert set(own_versions()) == {"python", "mixtura", "torch", "transformers", "numpy"}


def test_lines_are_for_people():
    said = lines(case(least=0.001).rows())
    assert " ".join(said[0].split()) == "> B/bf16/T8 mixtura 2 ms 1.50 of the best peer 50% of the limit"
    assert not said[1].startswith(">")
    assert max(map(len, said)) <= 120


def test_tables_have_ours_the_best_peer_and_what_lies_beside():
    report = Report("layer", 2)
    both = {"mixtura": 0.001, "transformers a": 0.004, "transformers b": 0.003, "x": 0.002, "twin": 0.0001}
    report.add(case("one", least=0.0005, seconds=both, beside=("twin",)))
    report.add(case("two", seconds={"mixtura": 0.0005, "other": 0.00025}, unit="tok/s"))
    report.add(case("three", seconds={"torch": 0.5}, unit="GF/s", foreign=0.5))
    head = "| case |  | mixtura | twin | transformers | best peer | mixtura / best peer | of the limit |"
    assert markdown(report.to_dict(), ["twin"]).splitlines() == [
        head,
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `one` | ms | 1 | 0.1 | 3 | 2 (x) | 2.00 | 50% |",
        "| `two` | tok/s | 2000 |  |  | 4000 (other) | 0.50 |  |",
        "| `three`* | GF/s |  |  |  | 2 (torch) |  |  |",
    ]


def test_tables_tell_cosines_and_leave_empty_columns_out():
    report = Report("decode", 2)
    report.add(case("few", seconds={"mixtura": 0.5, "peer": 1.0}, cosines={"mixtura": 0.99, "peer": 0.5}))
    assert markdown(report.to_dict()).splitlines() == [
        "| case |  | mixtura | best peer | mixtura / best peer | cosine, mixtura / best peer |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `few` | ms | 500 | 1000 (peer) | 2.00 | 0.99000 / 0.50000 |",
    ]
