"""The command ``fit``: files that it writes, JSON, and exit codes."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from density.tables import rows
from mixtura.cli.main import app
from mixtura.density import GaussianMixture

X, WHICH = rows()


def run(*arguments):
    return CliRunner().invoke(app, ["fit", *map(str, arguments)])


def table(tmp_path):
    lines = [f"{a:.6f},{b:.6f},{c:.6f},kind{k}\n" for (a, b, c), k in zip(X, WHICH, strict=True)]
    path = tmp_path / "table.csv"
    path.write_text("length,width,height,kind\n" + "".join(lines))
    return path


def test_a_table_becomes_a_report_a_mixture_and_components(tmp_path):
    out, saved, assigned = (tmp_path / name for name in ("report.html", "mixture.safetensors", "components.csv"))
    options = ["--components", "2-4", "--families", "VII,VVI", "--out", out, "--save", saved, "--assign", assigned]
    done = run(table(tmp_path), *options)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"{out}: VII with 3 components"
    assert len(lines) == 1 + 3 + 1
    assert lines[-1] == "careful: Column 'kind' was left out: it holds text such as 'kind2' in line 2."
    assert "table.csv: 200 rows, 3 columns" in out.read_text("utf-8")
    mixture = GaussianMixture.load(saved)
    assert mixture.feature_names_in_.tolist() == ["length", "width", "height"]
    found = np.loadtxt(assigned, delimiter=",", skiprows=1)
    agreement = [np.bincount(WHICH[found[:, 0] == k + 1]).max() for k in range(3)]
    assert sum(agreement) > 150
    assert ((found[:, 1] > 0.3) & (found[:, 1] <= 1)).all()


def test_for_machines(tmp_path):
    path = table(tmp_path)
    options = ["--columns", "width,length", "--components", "2", "--families", "EEE", "--criterion", "icl", "--json"]
    told = json.loads(run(path, *options, "--out", tmp_path / "r.html").stdout)
    assert (told["n_components"], told["covariance"], told["criterion"]) == (2, "EEE", "icl")
    assert list(told["components"][0]["means"]) == ["width", "length"]
    assert told["cautions"] == []
    assert told["rows_scored"] == 200
    told = json.loads(run(path, *options, "--rows", 150, "--out", tmp_path / "r.html").stdout)
    assert told["rows_scored"] == 150


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    path = table(tmp_path)
    wrong = [
        ([tmp_path / "none.csv"], "No such file"),
        ([path, "--columns", "weight"], "unknown column 'weight'; did you mean 'height'"),
        ([path, "--components", "9-2"], "components must be numbers of at least 1"),
        ([path, "--components", "one"], "components must be numbers of at least 1"),
        ([path, "--components", "1-99999999999"], "components must be at most 200, as many as the table has rows"),
        ([path, "--columns", "width,height,width"], "column 'width' is named twice"),
        ([path, "--save", tmp_path], "a file cannot be written to"),
        ([path, "--assign", path / "x"], "Error: "),
        ([path, "--families", "VVX"], "unknown covariance family 'VVX'"),
        ([path, "--weight", "kind"], "column 'kind' cannot be used: it holds text"),
        ([path, "--criterion", "sic"], "criterion must be one of"),
    ]
    for arguments, message in wrong:
        done = run(*arguments, "--out", tmp_path / "report.html")
        assert done.exit_code == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_no_file_is_written_over_another(tmp_path):
    path = table(tmp_path)
    before, link = path.read_bytes(), tmp_path / "link.csv"
    link.symlink_to(path)
    report = tmp_path / "r.html"
    wrong = [
        (["--out", path], "--out must be another file than the table"),
        (["--out", report, "--assign", tmp_path / "." / "table.csv"], "--assign must be another file than the table"),
        (["--out", report, "--save", link], "--save must be another file than the table"),
        (["--out", report, "--save", report], "--save must be another file than --out"),
        (["--out", report, "--save", tmp_path / "m", "--assign", tmp_path / "m"], "--assign must be another file than"),
    ]
    for arguments, message in wrong:
        done = run(path, *arguments)
        assert done.exit_code == 2
        assert message in done.stderr
    assert path.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link.csv", "table.csv"]
    assert "another file" in run(tmp_path / "none.csv", "--out", tmp_path / "none.csv").stderr


def test_bad_paths_are_found_before_the_fit(tmp_path, monkeypatch):
    def no_fit(*_, **__):
        raise AssertionError

    monkeypatch.setattr("mixtura.density.fit_table.fit_table", no_fit)
    for option in ("--out", "--save", "--assign"):
        assert run(table(tmp_path), "--out", tmp_path / "r.html", option, tmp_path).exit_code == 2
    assert [one.name for one in tmp_path.iterdir()] == ["table.csv"]


def test_the_saved_mixture_starts_afresh_also_if_rows_were_drawn(tmp_path):
    saved = tmp_path / "mixture.safetensors"
    options = ["--components", 2, "--families", "EII", "--out", tmp_path / "r.html", "--save", saved]
    for rows_drawn in (50, 1000):
        assert run(table(tmp_path), *options, "--rows", rows_drawn).exit_code == 0
        assert GaussianMixture.load(saved).warm_start is False


def test_a_name_with_a_comma_is_quoted(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('"length, in cm",width,height\n' + "".join(f"{a:.3f},{b:.3f},{c:.3f}\n" for a, b, c in X))
    options = ["--components", 1, "--families", "EII", "--out", tmp_path / "r.html", "--json"]
    told = json.loads(run(path, "--columns", 'height, "length, in cm"', *options).stdout)
    assert list(told["components"][0]["means"]) == ["height", "length, in cm"]


def test_a_few_rows_of_many_have_a_weight(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,w\n" + "".join(f"{i * i % 101},{1 if i in (3, 70, 5000) else 0}\n" for i in range(6000)))
    done = run(path, "--weight", "w", "--rows", 50, "--out", tmp_path / "r.html", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows_scored"] == 3


def test_each_row_has_a_line_of_its_own(tmp_path):
    path, assigned = tmp_path / "t.csv", tmp_path / "components.csv"
    path.write_text("a,b\n" + "".join(f"{a:.3f},{b:.3f}\n{',' * (i == 7)}\n" for i, (a, b, _) in enumerate(X)))
    done = run(path, "--components", 2, "--families", "EII", "--out", tmp_path / "r.html", "--assign", assigned)
    assert done.exit_code == 0
    found = np.loadtxt(assigned, delimiter=",", skiprows=1)
    assert len(found) == len(X) + 1
    alone = GaussianMixture(2, covariance="EII", random_state=0).fit(X[:, :2])
    assert found[8, 1] == pytest.approx(alone.weights_.max(), abs=0.05)
