"""The command ``bench``: rows for people, JSON, one line for wrong input."""

import json

import pytest
import torch
from typer.testing import CliRunner

from mixtura.bench import limits as limits_module
from mixtura.bench.limits import Read
from mixtura.cli.main import app


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(limits_module, "_PRODUCTS", [(3, 4, 5)])
    monkeypatch.setattr(limits_module, "_VECTOR", (6, 7))
    monkeypatch.setattr(limits_module, "Read", lambda who: Read(who, 1 << 16))
    monkeypatch.setattr("mixtura.bench.measuring.used_seconds", lambda own: None)
    monkeypatch.delenv("MIXTURA_PEERS", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_rows_and_a_file(tmp_path):
    done = run("limits", "--rounds", 1, "--json", tmp_path / "limits.json")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "limits.json").read_text())
    assert [row["case"] for row in told["rows"]] == [
        line.split()[1] if line[0] == ">" else line.split()[0] for line in done.stdout.splitlines()
    ]
    assert told["kind"] == "limits"
    assert told["quiet"] is None
    assert done.stderr == "careful: whether the machine was quiet cannot be known here\n"


def test_json_on_standard_output():
    done = run("limits", "--cases", "gemm/*", "--rounds", 1, "--json", "-")
    assert done.exit_code == 0, done.output
    assert [row["case"] for row in json.loads(done.stdout)["rows"]] == ["gemm/fp32/3x4x5", "gemm/bf16/3x4x5"]
    assert "gemm/fp32/3x4x5" in done.stderr


def test_by_the_processor(tmp_path):
    path = tmp_path / "limits.json"
    done = run("limits", "--rounds", 1, "--threads", 1, "--clock", "processor", "--json", path)
    assert done.exit_code == 0, done.output
    told = json.loads(path.read_text())
    assert told["clock"] == "processor"
    assert all(row["value"] > 0 for row in told["rows"])


def test_cases_of_a_file_are_kept(tmp_path):
    path = tmp_path / "limits.json"
    for pattern in ("gemm/*", "gemv/bf16", "read"):
        done = run("limits", "--cases", pattern, "--rounds", 1, "--json", path, "--keep")
        assert done.exit_code == 0, done.output
    assert list(json.loads(path.read_text())["foreign"]) == ["gemm/fp32/3x4x5", "gemm/bf16/3x4x5", "gemv/bf16", "read"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["limit"], "error: unknown benchmark 'limit'; did you mean 'limits'"),
        (["limits", "--cases", "none/*"], "error: no case of 'limits' matches 'none/*'"),
        (["limits", "--clock", "walk"], "error: unknown clock 'walk'; did you mean 'wall'"),
        (
            ["limits", "--clock", "processor", "--threads", 2],
            "error: the clock 'processor' is for one thread (--threads 1), got 2",
        ),
        (["layer", "--peers", "zentorh"], "error: unknown peer 'zentorh'; did you mean 'zentorch'"),
        (["layer", "--peers", "vllm"], "error: peer 'vllm' is not set up: no folder was given (--peers-folder or"),
        (["layer", "--peers-folder", "nowhere"], "error: the folder of peers 'nowhere' does not exist"),
        (["limits", "--json", "."], "error: the result must go to a file, got the folder '.'"),
        (
            ["limits", "--lock", "nowhere/lock"],
            "error: FileNotFoundError: [Errno 2] No such file",
        ),
    ],
    ids=["kind", "cases", "clock", "threads", "peer", "not set up", "folder", "file", "lock"],
)
def test_wrong_input_is_one_line(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
