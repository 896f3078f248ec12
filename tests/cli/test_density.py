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


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    path = table(tmp_path)
    wrong = [
        ([tmp_path / "none.csv"], "No such file"),
        ([path, "--columns", "weight"], "unknown column 'weight'; did you mean 'height'"),
        ([path, "--components", "9-2"], "components must be numbers of at least 1"),
        ([path, "--components", "one"], "components must be numbers of at least 1"),
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


def test_each_row_has_a_line_of_its_own(tmp_path):
    path, assigned = tmp_path / "t.csv", tmp_path / "components.csv"
    path.write_text("a,b\n" + "".join(f"{a:.3f},{b:.3f}\n{',' * (i == 7)}\n" for i, (a, b, _) in enumerate(X)))
    done = run(path, "--components", 2, "--families", "EII", "--out", tmp_path / "r.html", "--assign", assigned)
    assert done.exit_code == 0
    found = np.loadtxt(assigned, delimiter=",", skiprows=1)
    assert len(found) == len(X) + 1
    alone = GaussianMixture(2, covariance="EII", random_state=0).fit(X[:, :2])
    assert found[8, 1] == pytest.approx(alone.weights_.max(), abs=0.05)
