"""``write_report``: one HTML file about a fitted mixture; no script, no network, light and dark. N rows, D columns."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from mixtura.core.errors import OptionError, ShapeError
from mixtura.core.files import write_file
from mixtura.density._base import MixtureBase
from mixtura.density._pictures import column_names, curves, outlines
from mixtura.density._svg import Plot, color, color_style
from mixtura.density._tables import as_numpy, check_table
from mixtura.density._words import Component, cautions, choice_words, components_of, family_words
from mixtura.density.search import MixtureSearch

Floats = NDArray[np.floating]
SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_PLANES = 1500, 8, 3
NAMED_FAMILIES = 5
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
:root{color-scheme:light dark;--line:#8884}body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;
padding:0 1rem}h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem}.grid{stroke:var(--line)}.axis{fill:none;
stroke:currentColor}svg{width:100%;max-width:32rem}svg text{font:12px system-ui,sans-serif;fill:currentColor}
svg .mark{font-weight:700;paint-order:stroke;stroke:Canvas;stroke-width:3px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1rem}.scroll{overflow-x:auto}
table{border-collapse:collapse}td,th{padding:.2rem .7rem;text-align:right;white-space:nowrap;
border-bottom:1px solid var(--line)}td:first-child,th:first-child{text-align:left}
i.dot{display:inline-block;width:.8em;height:.8em;border-radius:50%}
ul.cautions li{margin:.3rem 0}figure{margin:0}figcaption{font-size:.85rem;text-align:center;max-width:32rem}
"""


def write_report(
    path: str | Path,
    fitted: Any,
    X: Any,
    *,
    sample_weight: Any = None,
    title: str = "",
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Write what a mixture says of a table, whole or not at all.

    Args:
        path: HTML file to write.
        fitted: a ``MixtureSearch``, or a fitted mixture.
        X: (N, D) rows, as they were fitted.
        sample_weight: (N,), as it was fitted.
        title: heading; by default the number of rows and columns.
        notes: sentences to add to the cautions.

    Returns:
        The same in plain data: n_components, covariance, components, cautions.

    Raises:
        OptionError: if ``fitted`` is something else, or weights are missing, negative, infinite or all 0.
        ShapeError: if there is not a weight for each row.
    """
    if not isinstance(fitted, MixtureSearch | MixtureBase):
        raise OptionError(f"fitted must be a MixtureSearch or a Gaussian mixture, got {type(fitted).__name__}")
    check_is_fitted(fitted)
    search = fitted if isinstance(fitted, MixtureSearch) else None
    mixture = fitted if search is None else search.best_estimator_
    names = column_names(mixture, mixture.means_.shape[1])
    data_ND = check_table(mixture if hasattr(X, "columns") else _nameless(mixture), X, reset=False)
    mixture = _nameless(mixture)
    weights_N = None if sample_weight is None else _check_weights(as_numpy(sample_weight), len(data_ND))
    components = components_of(mixture, data_ND, names, weights_N)
    careful = [*notes, *cautions(mixture, data_ND, components, search)]
    heading = title or f"A mixture of {len(data_ND):,} rows and {data_ND.shape[1]} columns"
    sections = [
        _intro(mixture, search),
        _section("Be careful", "<ul class=cautions>" + "".join(f"<li>{escape(one)}</li>" for one in careful) + "</ul>")
        if careful
        else "",
        _section("Components", _components(components) + _noise(mixture)),
        _section("Pictures", f'<div class="plots">{"".join(_pictures(mixture, data_ND, names, search))}</div>'),
        _section("Models tried", _candidates(search)) if search is not None else "",
    ]
    with write_file(Path(path)) as partial:
        partial.write_text(_page(heading, "".join(sections)), "utf-8")
    return {
        "n_components": len(components),
        "covariance": mixture.covariance,
        "components": [one._asdict() for one in components],
        "cautions": careful,
    }


def _check_weights(sample_weight: Any, N: int) -> Floats:
    try:
        weights_N = np.asarray(sample_weight, dtype=float)
    except (TypeError, ValueError) as error:
        raise OptionError(f"sample_weight must be numbers: {error}") from error
    if weights_N.shape != (N,):
        raise ShapeError(f"sample_weight must have a weight for each of {N} rows, got shape {weights_N.shape}")
    if not (np.isfinite(weights_N).all() and (weights_N >= 0).all() and weights_N.any()):
        raise OptionError("sample_weight must not be missing, infinite, negative, or all 0")
    return weights_N


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{color_style()}{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _intro(mixture: Any, search: Any) -> str:
    K = len(mixture.weights_)
    kind = family_words(mixture.covariance, K)
    words = f"{K} {kind}." if "components" in kind else f"{K} component{'s' * (K > 1)}: {kind}."
    chosen = f"<p>{escape(choice_words(search))}</p>" if search is not None else ""
    return f"<p><strong>{escape(words)}</strong></p>{chosen}"


def _components(components: Sequence[Component]) -> str:
    parts = []
    for k, one in enumerate(components):
        dot = f'<i class="dot" style="background:{color(k)}"></i>'
        rows = _counted(one.rows) + (f", sure to {_certain(one.certainty)}" if one.rows > 0 else "")
        parts.append(f"<p>{dot} <strong>Component {k + 1}</strong>, {one.weight:.1%} ({rows}). {escape(one.words)}</p>")
    head = "".join(f"<th>{k + 1}</th>" for k in range(len(components)))
    lines = [
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{plus_minus(one.means[name], one.deviations[name])}</td>" for one in components)
        + "</tr>"
        for name in components[0].means
    ]
    table = f"<table><thead><tr><th>mean ± deviation</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return "".join(parts) + f'<div class="scroll">{table}</div>'


def _counted(rows: float) -> str:
    return f"{rows:,.6g} row{'s' * (rows != 1)}"


def _certain(share: float) -> str:
    """A probability in percent, that is not rounded to certainty."""
    return "over 99%" if 0.99 < share < 1 else f"{share:.0%}"


def plus_minus(mean: float, deviation: float) -> str:
    """A mean to the last digit that its deviation, in two digits, speaks of."""
    decimals = 1 - int(np.floor(np.log10(deviation)))
    if not -5 < decimals < 7:
        return f"{mean:.3g} ± {deviation:.2g}"
    shown = max(decimals, 0)
    return f"{round(mean, decimals) + 0.0:,.{shown}f} ± {round(deviation, decimals):,.{shown}f}"


def _noise(mixture: Any) -> str:
    if mixture.noise_log_density_ is None:
        return ""
    return f"<p>{mixture.noise_weight_:.1%} is noise, spread evenly over the region of the data.</p>"


def _candidates(search: Any, most: int = 12) -> str:
    best: dict[tuple[int, str], Any] = {}
    for one in search.candidates_:  # the best first
        if np.isfinite(one.score):
            best.setdefault(one[:2], one)
    lines = [
        f"<tr><td>{one.covariance}</td><td>{one.n_components}</td><td>{one.score:,.2f}</td>"
        f"<td>{one.log_likelihood:,.2f}</td><td>{one.n_parameters}</td></tr>"
        for one in best.values()
    ]
    failed = sum(bool(one.error) for one in search.candidates_)
    columns = ("family", "components", search.criterion.upper(), "log likelihood", "parameters")
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    more = f"<p>{failed} fits failed, such as: {escape(_first_error(search))}</p>" if failed else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines[:most])}</tbody></table>{more}"


def _first_error(search: Any) -> str:
    return next(one.error for one in search.candidates_ if one.error)


def _nameless(mixture: Any) -> Any:
    """The mixture without names of columns, which takes plain arrays without a warning."""
    mixture = copy.copy(mixture)
    vars(mixture).pop("feature_names_in_", None)
    return mixture


def _pictures(mixture: Any, data_ND: Floats, names: Sequence[str], search: Any) -> list[str]:
    order_D = _telling_columns(mixture)
    shown = np.linspace(0, len(data_ND) - 1, min(len(data_ND), SHOWN_ROWS)).astype(int)
    part_MD, found_M = data_ND[shown], mixture.predict(data_ND[shown])
    planes = list(combinations(order_D[:3], 2))[:SHOWN_PLANES]
    pictures = [_plane(mixture, part_MD, found_M, pair, names) for pair in planes]
    pictures += [_column(mixture, data_ND, d, names) for d in order_D[:SHOWN_COLUMNS]]
    return [*pictures, _criteria(search)] if search is not None else pictures


def _telling_columns(mixture: Any) -> list[int]:
    """Columns, first those whose variance lies most between the components."""
    center_D = mixture.weights_ @ mixture.means_ / mixture.weights_.sum()
    within_D = mixture.weights_ @ np.diagonal(mixture.covariances_, 0, 1, 2)
    between_D = mixture.weights_ @ (mixture.means_ - center_D) ** 2
    return np.argsort(-between_D / (within_D + between_D), kind="stable").tolist()


def _plane(mixture: Any, part_MD: Floats, found_M: Any, pair: tuple[int, int], names: Sequence[str]) -> str:
    index = list(pair)
    whole_M = ~np.isnan(part_MD[:, index]).any(1)
    xy_M2, means_K2 = part_MD[whole_M][:, index], mixture.means_[:, index]
    covariances_K22 = mixture.covariances_[:, index][:, :, index]
    lines = {radius: outlines(means_K2, covariances_K22, radius) for radius in (1, 2)}
    every_P2 = np.concatenate([xy_M2, lines[2].reshape(-1, 2)])
    (low, high), title = (every_P2.min(0), every_P2.max(0)), f"{names[pair[1]]} by {names[pair[0]]}"
    plot = Plot((low[0], high[0]), (low[1], high[1]), title, names[pair[0]], names[pair[1]])
    plot.points(xy_M2, [color(k) for k in found_M[whole_M]])
    for radius, lines_KP2 in lines.items():
        for k, line_P2 in enumerate(lines_KP2):
            plot.line(line_P2, color(k), width=2.4 / radius, label=f"component {k + 1}, {radius} deviations")
    for k, mean_2 in enumerate(means_K2):
        plot.text((mean_2[0], mean_2[1]), str(k + 1))
    return plot.svg()


def _column(mixture: Any, data_ND: Floats, d: int, names: Sequence[str]) -> str:
    values = data_ND[:, d][~np.isnan(data_ND[:, d])]
    heights, edges = np.histogram(values, bins=min(60, max(8, int(np.sqrt(len(values))))), density=True)
    grid_P = np.linspace(edges[0], edges[-1], 240)
    means_K, variances_K = mixture.means_[:, d], mixture.covariances_[:, d, d]
    deviations_K = np.sqrt(variances_K)
    z_KP = (grid_P - means_K[:, None]) / deviations_K[:, None]
    parts_KP = mixture.weights_[:, None] * np.exp(-0.5 * z_KP**2) / (deviations_K[:, None] * np.sqrt(2 * np.pi))
    top = max(heights.max(), parts_KP.sum(0).max())
    plot = Plot((edges[0], edges[-1]), (0, top), f"density of {names[d]}", names[d], "density")
    plot.bars(edges, heights)
    for k, part_P in enumerate(parts_KP):
        plot.line(np.stack([grid_P, part_P], 1), color(k), label=f"component {k + 1}")
    plot.line(np.stack([grid_P, parts_KP.sum(0)], 1), "currentColor", width=1, label="all components")
    return plot.svg()


def _criteria(search: Any) -> str:
    found = sorted(curves(search.candidates_), key=lambda curve: min(curve.scores))
    scores = [score for curve in found[:NAMED_FAMILIES] for score in curve.scores]
    top = float(np.quantile(scores, 0.9))  # a bad one would press the others flat
    sizes = [K for curve in found for K in curve.n_components]
    name = search.criterion.upper()
    title = f"{name} by components"
    plot = Plot((min(sizes), max(sizes)), (min(scores), top), title, "components", name, whole_x=True)
    for i, curve in reversed(list(enumerate(found))):
        named = i < NAMED_FAMILIES
        stroke, line_P2 = color(i) if named else "currentColor", np.array([curve.n_components, curve.scores], float).T
        line_P2 = line_P2[line_P2[:, 1] <= top]
        if not len(line_P2):
            continue
        plot.line(line_P2, stroke, width=2.6 if i == 0 else 1.4, opacity=1 if named else 0.3, label=curve.covariance)
        if named:
            plot.points(line_P2, [stroke] * len(line_P2), radius=2.5)
    key = (f'<i class="dot" style="background:{color(i)}"></i> {one.covariance}' for i, one in enumerate(found))
    more = f", others gray ({len(found) - NAMED_FAMILIES})" if len(found) > NAMED_FAMILIES else ""
    return f"<figure>{plot.svg()}<figcaption>{', '.join(list(key)[:NAMED_FAMILIES])}{more}</figcaption></figure>"


def plain(value: Any) -> Any:
    """Plain data for JSON: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
