"""From a file to a report: what is read, what is left out, what is said, what is drawn."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV

from density.tables import rows, with_holes
from mixtura.core.errors import FileFormatError, OptionError, ShapeError, UnknownNameError
from mixtura.density import GaussianMixture, GaussianMixtureRegressor, MixtureSearch, SplitMergeMixture
from mixtura.density._svg import HEIGHT, LEFT, WIDTH, Plot, ticks
from mixtura.density._words import choice_words, components_of, family_words
from mixtura.density.families import FAMILIES
from mixtura.density.fit_table import fit_table
from mixtura.density.report import plain, plus_minus, write_report
from mixtura.density.table import Table, read_table

X, WHICH = rows()
SMALL = {"n_components": [2, 3, 4], "covariance": ["EII", "VVI"]}


def written(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("text", [
    "a,b\n1,2.5\n3,NA\n",
    "a;b\n1;2,5\n3;?\n",
    "a\tb\n1\t2.5\n\n3\t\n",
    '"a" | "b"\r\n1|2.5\r\n3|nan\r\n',
    b"\xef\xbb\xbfa,b\n1,2.5\n3,null\n",
])  # fmt: skip
def test_tables_are_read(text, tmp_path):
    table = read_table(written(tmp_path, text))
    assert table.names == ["a", "b"]
    np.testing.assert_array_equal(table.data_ND, [[1, 2.5], [3, np.nan]])


def test_lines_without_names_and_double_names(tmp_path):
    assert read_table(written(tmp_path, "1,2\n3,4\n")).names == ["column 0", "column 1"]
    assert read_table(written(tmp_path, "a,,a\n3,4,5\n")).names == ["a", "column 1", "a (2)"]
    assert read_table(written(tmp_path, "a\n3\n4\n")).data_ND.shape == (2, 1)


@pytest.mark.parametrize(
    ("text", "names", "values"),
    [
        ("5,1;1,4\n4,9;1,4\n", ["column 0", "column 1"], [[5.1, 1.4], [4.9, 1.4]]),
        ("length, in cm;width, in cm\n5,1;1,4\n4,9;2\n", ["length, in cm", "width, in cm"], [[5.1, 1.4], [4.9, 2]]),
        ("a, b\tc, d\n1,5\t2,5\n", ["a, b", "c, d"], [[1.5, 2.5]]),
        ('"a";"b, in cm, at noon"\n5;1,4\n', ["a", "b, in cm, at noon"], [[5, 1.4]]),
    ],
)
def test_a_semicolon_or_a_tab_delimits_before_a_comma(text, names, values, tmp_path):
    table = read_table(written(tmp_path, text))
    assert table.names == names
    np.testing.assert_array_equal(table.data_ND, values)
    assert table.notes == ["Commas in numbers were read as decimal signs."]


def test_a_comma_delimits_where_others_do_not_split_all_lines_alike(tmp_path):
    table = read_table(written(tmp_path, 'a,b,kind\n1,2,"x;y"\n3,4,"x;y;z"\n'))
    assert (table.names, table.notes) == (["a", "b"], [])
    wide = ",".join(["12345678"] * 30_000)
    assert read_table(written(tmp_path, f"{wide}\n{wide}\n")).data_ND.shape == (2, 30_000)


def test_decimal_commas_are_told_with_the_fit(tmp_path):
    lines = [";".join(f"{value:.4f}".replace(".", ",") for value in row) for row in X]
    found = fit_table(read_table(written(tmp_path, "\n".join(lines))), columns=["column 1"], **SMALL)
    assert found.notes == ["Commas in numbers were read as decimal signs."]


@pytest.mark.parametrize(
    ("text", "names", "data", "notes"),
    [
        ("5.1,3.5,setosa\n4.9,3,setosa\n", ["column 0", "column 1"], [[5.1, 3.5], [4.9, 3]], 1),
        ("NA,3.5,setosa\n4.9,3,setosa\n", ["column 0", "column 1"], [[np.nan, 3.5], [4.9, 3]], 1),
        ("2019,2020\n1,2\n", ["column 0", "column 1"], [[2019, 2020], [1, 2]], 0),
        ("a,na,inf\n1,2,3\n", ["a", "na", "inf"], [[1, 2, 3]], 0),
    ],
)
def test_a_line_with_a_number_holds_no_names(text, names, data, notes, tmp_path):
    table = read_table(written(tmp_path, text))
    assert table.names == names
    np.testing.assert_array_equal(table.data_ND, data)
    assert table.notes == ["The first line was read as a row, not as names of columns: it holds numbers."] * notes


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a,b\n1,2\n,\n3,4\n , \n", [[1, 2], [np.nan, np.nan], [3, 4], [np.nan, np.nan]]),
        ("1,2\n\n,\n  \n3,4\n", [[1, 2], [np.nan, np.nan], [3, 4]]),
        (",\na,b\n1,2\n", [[1, 2]]),
        ("a\tb\n1\t2\n\t\n", [[1, 2], [np.nan, np.nan]]),
        ('a\n1\n""\n\n2\n', [[1], [np.nan], [2]]),
    ],
)
def test_a_row_without_values_is_a_row_and_an_empty_line_is_not(text, values, tmp_path):
    np.testing.assert_array_equal(read_table(written(tmp_path, text)).data_ND, values)


def test_text_columns_are_left_out_by_name(tmp_path):
    table = read_table(written(tmp_path, "a,kind,b\n1,x,2\n\n3,4,inf\n"))
    assert table.names == ["a"]
    assert table.left_out == {"kind": "holds text such as 'x' in line 2", "b": "holds an infinite value in line 4"}
    with pytest.raises(OptionError, match="column 'kind' cannot be used: it holds text such as 'x' in line 2"):
        table.only(["kind"])
    with pytest.raises(UnknownNameError, match="unknown column 'aa'; did you mean 'a'"):
        table.only(["aa"])


def test_arrays_are_mapped(tmp_path):
    np.save(tmp_path / "table.npy", X)
    table = read_table(tmp_path / "table.npy")
    assert isinstance(table.data_ND, np.memmap)
    np.testing.assert_array_equal(table.data_ND, X)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_infinite_columns_of_arrays_are_left_out(dtype, tmp_path):
    data = X.astype(dtype)
    data[7, 1], data[9, 1], data[3, 2] = -np.inf, np.nan, np.nan
    np.save(tmp_path / "table.npy", data)
    table = read_table(tmp_path / "table.npy")
    np.testing.assert_array_equal(table.data_ND, data[:, [0, 2]])
    assert table.left_out == {"column 1": "holds an infinite value in row 7, counted from 0"}
    np.save(tmp_path / "table.npy", data[:, 1:2])
    with pytest.raises(FileFormatError, match=r"no column of .* finite numbers: 'column 0' holds an infinite"):
        read_table(tmp_path / "table.npy")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "t.csv", "is empty"),
        ("a,b\n", "t.csv", "holds names of columns, and no row"),
        ("a,b\n1,2\n3\n", "t.csv", "has 1 cells in line 3, and 2 in the first"),
        ("x" * 200_000, "t.csv", "is no table: field larger than field limit"),
        ("a,b\nx,y\nz,w\n", "t.csv", "finite numbers: 'a' holds text such as 'x' in line 2; 'b' holds text"),
        ("a,b,c,d,e\nx,x,x,x,inf\n", "t.csv", "in line 2; and 2 more"),
        (b"a\xff\n", "t.csv", "is not text in UTF-8: invalid start byte at byte 1"),
        (b"\x93NUMPY", "t.npy", "is no array of numbers"),
    ],
)
def test_what_is_no_table_is_refused(text, name, message, tmp_path):
    with pytest.raises(FileFormatError, match=message):
        read_table(written(tmp_path, text, name))


def test_arrays_of_other_forms_are_refused(tmp_path):
    for array in (np.arange(3), np.array([["a"]]), np.zeros((0, 2))):
        np.save(tmp_path / "t.npy", array)
        with pytest.raises(FileFormatError, match="must hold a table of numbers"):
            read_table(tmp_path / "t.npy")
    np.save(tmp_path / "t.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(FileFormatError, match="is no array of numbers"):
        read_table(tmp_path / "t.npy")


def table_of(data, names="abc"):
    return Table(list(names)[: data.shape[1]], data)


def test_useless_columns_are_left_out_and_named_ones_are_not():
    extra = np.c_[X, np.arange(200), np.full(200, 7.0), np.full(200, np.nan)]
    found = fit_table(table_of(extra, ["a", "b", "c", "id", "one", "none"]), **SMALL)
    assert found.names == ["a", "b", "c"]
    assert found.notes == [
        "Column 'id' was left out: it numbers the rows.",
        "Column 'one' was left out: it holds 7 in every row.",
        "Column 'none' was left out: it holds no value.",
    ]
    alone = fit_table(table_of(X), **SMALL)
    assert found.search.best_ == alone.search.best_
    assert found.search.best_estimator_.feature_names_in_.tolist() == ["a", "b", "c"]
    assert np.array_equal(found.components_N, alone.search.best_estimator_.predict(to_frame(X)))
    named = fit_table(table_of(extra, ["a", "b", "c", "id", "one", "none"]), columns=["id", "a"], **SMALL)
    assert named.names == ["id", "a"]
    assert named.notes == []
    with pytest.raises(OptionError, match="no column can be fitted: 'a' holds 1 in every row"):
        fit_table(table_of(np.ones((5, 1))))


def to_frame(data, names="abc"):
    import pandas

    return pandas.DataFrame(data, columns=list(names))


def test_rows_without_values_have_a_component_and_change_none():
    gaps = X.copy()
    gaps[[3, 70]] = np.nan
    found, without = (fit_table(table_of(data), **SMALL) for data in (gaps, np.delete(X, [3, 70], 0)))
    best = found.search.best_estimator_
    assert found.notes == ["2 rows hold no value: there the components are as probable as their weights say."]
    assert (found.components_N[[3, 70]] == best.weights_.argmax()).all()
    np.testing.assert_allclose(found.probabilities_N[[3, 70]], best.weights_.max())
    np.testing.assert_allclose(*(np.sort(one.search.best_estimator_.means_, 0) for one in (found, without)), atol=0.05)


def test_weights_of_a_column():
    weights = np.arange(200) % 3
    found = fit_table(table_of(np.c_[X, weights], "abcw"), weight="w", **SMALL)
    many = fit_table(table_of(np.repeat(X, weights, 0)), **SMALL)
    assert found.search.best_[:2] == many.search.best_[:2]
    assert found.search.best_.score == pytest.approx(many.search.best_.score, rel=1e-6)
    assert found.notes == ["Column 'w' was left out: it holds the weights."]
    few = np.where(np.isin(np.arange(200), [3, 50, 51, 120, 160, 199]), weights + 1, 0)
    found = fit_table(table_of(np.c_[X, few], "abcw"), weight="w", n_components=[1], covariance="VVI", rows=4)
    assert found.notes[1:] == ["The model was chosen on 4 rows drawn at random, then fitted to all 6 with a weight."]
    np.testing.assert_allclose(found.search.best_estimator_.means_[0], np.average(X, 0, few), rtol=1e-6)
    with pytest.raises(OptionError, match="weights in column 'c' must not be missing, negative"):
        fit_table(table_of(X), weight="c")


def test_weights_that_sum_to_few_rows_are_told():
    shares = table_of(np.c_[X, np.full(200, 1 / 200)], "abcw")
    said = "Weights count rows, and they sum to 1, less than the "
    assert any(note.startswith(said) for note in fit_table(shares, weight="w", **SMALL).notes)


def test_sizes_are_at_most_the_distinct_rows():
    few = table_of(np.repeat(X[:4], 50, 0))
    with pytest.raises(
        OptionError, match=r"n_components must be at most the number of distinct rows .*, 4, got 300,000"
    ):
        fit_table(few, n_components=range(1, 300_001))
    found = fit_table(few, covariance="EII")
    assert {one.n_components for one in found.search.candidates_} == {1, 2, 3, 4}
    with pytest.raises(OptionError, match="at most the number of distinct rows that are searched, 20, got 21"):
        fit_table(table_of(X), n_components=[21], rows=20)


def test_a_large_table_is_searched_in_part_and_fitted_whole():
    big, _ = rows(3000, seed=4)
    found = fit_table(table_of(big), rows=300, **SMALL)
    assert found.notes == ["The model was chosen on 300 rows drawn at random, then fitted to all 3,000."]
    best = found.search.best_estimator_
    whole = GaussianMixture(3, covariance=best.covariance, reg_covar=0, tol=1e-5, max_iter=1000, random_state=0)
    assert best.n_components == 3
    assert best.score(to_frame(big)) == pytest.approx(whole.fit(big).score(big), abs=1e-3)


def test_words_of_iris():
    iris = load_iris()
    search = MixtureSearch([1, 2, 3], covariance=["VEV", "EII"], random_state=0).fit(iris.data)
    text = choice_words(search)
    assert text.startswith(
        "VEV with 2 components has the best BIC, 561.728, of 6 models tried. Next is VEV with 3, 0.8"
    )
    assert text.endswith("worse: no real difference.")
    mixture = search.best_estimator_
    small, large = sorted(components_of(mixture, iris.data, iris.feature_names), key=lambda one: one.weight)
    assert small.words.startswith("petal length (cm) clearly lower; petal width (cm) clearly lower; sepal length (cm)")
    assert "sepal length (cm) and sepal width (cm) rise together (correlation 0.8" in small.words
    assert (round(small.rows), round(large.rows)) == (50, 100)
    assert small.means["petal length (cm)"] == pytest.approx(iris.data[:50, 2].mean(), abs=0.01)
    assert small.deviations["petal length (cm)"] == pytest.approx(iris.data[:50, 2].std(), abs=0.02)
    assert small.certainty > 0.99


def test_every_family_has_its_own_words():
    assert len({family_words(name, 2) for name in FAMILIES}) == 14
    assert family_words("VEV", 2) == "components of different volumes and equal shapes, each turned its own way"
    assert family_words("EII", 2) == "round components of equal volumes"
    assert family_words("VVI", 1) == "independent columns"


def pictures(html):
    return [ElementTree.fromstring(one) for one in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


def test_report(tmp_path):
    search = MixtureSearch(range(1, 5), covariance=["EII", "VVV"], random_state=0).fit(to_frame(X))
    told = write_report(tmp_path / "report.html", search, to_frame(X), title="<A & B>", notes=["Mind the <gap>."])
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "<h1>&lt;A &amp; B&gt;</h1>" in html
    assert "<li>Mind the &lt;gap&gt;.</li>" in html
    assert "http" not in html.replace("http-equiv", "")
    assert "<script" not in html
    assert told["n_components"] == search.best_.n_components
    assert told["covariance"] == search.best_.covariance
    for one in told["components"]:
        assert one["words"] in html
        assert f"{one['weight']:.1%}" in html
    found = pictures(html)
    assert len(found) == 3 + 3 + 1
    for picture in found:
        assert picture.get("aria-label")
        for dot in picture.iter("circle"):
            assert 0 <= float(dot.get("cx")) <= WIDTH
            assert 0 <= float(dot.get("cy")) <= HEIGHT
    assert sum(1 for _ in found[0].iter("circle")) == len(X)
    assert f"<td>{search.best_.score:,.2f}</td>" in html


def test_report_of_one_mixture_of_one_column_with_holes_and_noise(tmp_path):
    holes = with_holes(np.vstack([X[:, :1], np.random.default_rng(0).uniform(-40, 40, (20, 1))]), 0.1)
    for noise in (False, True):
        mixture = GaussianMixture(2, noise_component=noise, random_state=0).fit(holes)
        told = write_report(tmp_path / "report.html", mixture, holes)
        html = (tmp_path / "report.html").read_text("utf-8")
        assert len(pictures(html)) == 1
        assert ("is noise, spread evenly" in html) == noise
        assert any("of the values are missing" in one for one in told["cautions"])


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (-np.ones(200), OptionError, "must not be missing, infinite, negative, or all 0"),
        (np.full(200, np.nan), OptionError, "must not be missing"),
        (np.r_[np.inf, np.ones(199)], OptionError, "must not be missing"),
        (np.zeros(200), OptionError, "must not be missing"),
        (np.ones(3), ShapeError, r"a weight for each of 200 rows, got shape \(3,\)"),
        (np.ones((200, 1)), ShapeError, r"a weight for each of 200 rows, got shape \(200, 1\)"),
        (["a"] * 200, OptionError, "sample_weight must be numbers"),
    ],
)
def test_no_report_of_weights_that_are_none(weights, error, message, tmp_path):
    mixture = GaussianMixture(2, random_state=0).fit(X)
    with pytest.raises(error, match=message):
        write_report(tmp_path / "report.html", mixture, X, sample_weight=weights)
    assert not list(tmp_path.iterdir())


def test_no_report_of_what_is_no_mixture(tmp_path):
    regressor = GaussianMixtureRegressor(1).fit(X[:, :2], X[:, 2])
    for other in (regressor, SplitMergeMixture(), GridSearchCV(GaussianMixture(), {}), None):
        with pytest.raises(OptionError, match=f"MixtureSearch or a Gaussian mixture, got {type(other).__name__}"):
            write_report(tmp_path / "report.html", other, X[:, :2])
    with pytest.raises(NotFittedError):
        write_report(tmp_path / "report.html", GaussianMixture(), X)
    assert not list(tmp_path.iterdir())


def test_a_report_of_a_mixture_of_given_parameters(tmp_path):
    mixture = GaussianMixture.from_parameters([0.5, 0.5], means=[[0, 0], [9, 9]], covariances=np.ones((2, 2)))
    assert write_report(tmp_path / "report.html", mixture, X[:, :2])["n_components"] == 2


def test_cautions(tmp_path):
    discrete = np.round(np.vstack([X, [[90, 90, 90]]]))
    search = MixtureSearch([1, 2], covariance="EII", random_state=0)
    with pytest.warns(match="largest n_components"):
        search.fit(discrete[:, :1])
    told = write_report(tmp_path / "report.html", search, discrete[:, :1])
    said = " ".join(told["cautions"])
    assert "of the rows repeat others" in said
    assert "has 1 row: too few to say much" in said
    assert "The largest number of components that was tried, 2, is the best" in said
    overlapping = GaussianMixture(3, random_state=0, covariance="EII").fit(
        np.random.default_rng(0).normal(size=(99, 2))
    )
    told = write_report(tmp_path / "report.html", overlapping, np.random.default_rng(0).normal(size=(99, 2)))
    assert any("overlaps with others" in one for one in told["cautions"])
    flat = np.c_[X[:, 0], X[:, 0] + 1e-5 * X[:, 1]]
    told = write_report(tmp_path / "report.html", GaussianMixture(1, reg_covar=0).fit(flat), flat)
    assert told["cautions"] == ["Component 1 is nearly flat: some columns nearly determine others in it."]


def test_ticks_are_round_and_lie_inside():
    for low, high in [(0, 1), (-3.2, 17), (1e-7, 3e-7), (561.2, 980), (-1e6, -9e5)]:
        found = ticks(low, high)
        assert 2 <= len(found) <= 7
        assert low <= found[0] <= found[-1] <= high
        assert np.ptp(np.diff(found)) < 1e-6 * (high - low)
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]


def test_a_plot_of_one_point_has_a_range():
    plot = Plot((3, 3), (0, 0), "t", "x", "y")
    plot.points(np.array([[3.0, 0.0]]), ["red"])
    assert f'cx="{(LEFT + WIDTH - 12) / 2}"' in plot.svg()


def test_means_are_shown_to_the_digits_that_deviations_speak_of():
    assert plus_minus(0.25213, 0.105) == "0.25 ± 0.10"
    assert plus_minus(123456.7, 3210.0) == "123,500 ± 3,200"
    assert plus_minus(-3.0, 1e-9) == "-3 ± 1e-09"
    assert plus_minus(-20.0, 1600.0) == "0 ± 1,600"
    assert plus_minus(5.0034, 0.391) == "5.00 ± 0.39"


def test_models_are_listed_best_first(tmp_path):
    search = MixtureSearch(range(2, 5), covariance=["EII", "VVV", "EEE"], random_state=0).fit(X)
    write_report(tmp_path / "report.html", search, X)
    table = (tmp_path / "report.html").read_text("utf-8").split("<h2>Models tried</h2>")[1]
    shown = [float(one.replace(",", "")) for one in re.findall(r"</td><td>\d</td><td>([-\d,.]+)</td>", table)]
    assert shown == sorted(shown)
    assert len(shown) == 9


def test_every_color_that_a_report_uses_is_defined_for_light_and_dark(tmp_path):
    write_report(tmp_path / "report.html", GaussianMixture(3, random_state=0).fit(X), X)
    html = (tmp_path / "report.html").read_text("utf-8")
    for name in set(re.findall(r"var\((--color\d)\)", html)):
        assert html.count(f"{name}:#") == 2


def test_plain_data_have_no_nan():
    assert plain({"a": [1.0, float("nan")], "b": (float("inf"), "x")}) == {"a": [1.0, None], "b": [None, "x"]}
