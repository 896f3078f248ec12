"""A fitted mixture in words: the family, the choice, each component, and what to be careful about.

N rows, D columns, K components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mixtura.density.families import find_family

Floats = NDArray[np.floating]
FEW_ROWS = 10
STEPS = ((1.5, "far {}"), (0.75, "clearly {}"), (0.35, "somewhat {}"))  # in standard deviations of all rows


class Component(NamedTuple):
    """One component for readers.

    Attributes:
        weight: share of the rows.
        rows: rows whose most probable component it is, weighted.
        certainty: mean responsibility for those rows; nan without any.
        means: by column.
        deviations: by column.
        words: what sets it apart.
    """

    weight: float
    rows: float
    certainty: float
    means: dict[str, float]
    deviations: dict[str, float]
    words: str


def family_words(name: str, K: int) -> str:
    """A covariance family in words."""
    family = find_family(name)
    if K == 1:
        return {"I": "independent columns", "E": "correlated columns", "V": "correlated columns"}[family.orientation]
    volume = "equal volumes" if family.volume == "E" else "different volumes"
    if family.shape == "I":
        return f"round components of {volume}"
    shape = "equal shapes" if family.shape == "E" else "different shapes"
    turns = {"I": "along the columns", "E": "turned alike", "V": "each turned its own way"}[family.orientation]
    return f"components of {volume} and {shape}, {turns}"


def choice_words(search: Any) -> str:
    """How the model was chosen, and how near the next one came."""
    best, criterion = search.best_, search.criterion.upper()
    tried = len({one[:2] for one in search.candidates_})
    text = f"{best.covariance} with {best.n_components} component{'s' * (best.n_components > 1)} has the best "
    text += f"{criterion}, {best.score:.6g}, of {tried} models tried."
    other = next((one for one in search.candidates_ if one[:2] != best[:2] and np.isfinite(one.score)), None)
    if other is None:
        return text
    gap = other.score - best.score
    near = "no real difference" if gap < 2 else "a small difference" if gap < 6 else "a clear difference"
    if gap < 10:
        return f"{text} Next is {other.covariance} with {other.n_components}, {gap:.2g} worse: {near}."
    return f"{text} Next is {other.covariance} with {other.n_components}, {gap:.3g} worse."


def components_of(mixture: Any, X: Floats, names: Sequence[str], weights_N: Floats | None = None) -> list[Component]:
    """Every component of a mixture, in its order, with what sets it apart from all rows."""
    K = len(mixture.weights_)
    weights_N = np.ones(len(X)) if weights_N is None else weights_N
    shares_NK, found_N = mixture.predict_proba(X), mixture.predict(X)
    center_D = mixture.weights_ @ mixture.means_ / mixture.weights_.sum()
    variances_KD = np.diagonal(mixture.covariances_, 0, 1, 2)
    spread_D = np.sqrt(mixture.weights_ @ (variances_KD + (mixture.means_ - center_D) ** 2) / mixture.weights_.sum())
    out = []
    for k in range(K):
        own_N = weights_N * (found_N == k)
        certainty = float(own_N @ shares_NK[:, k] / own_N.sum()) if own_N.sum() > 0 else float("nan")
        apart_D = (mixture.means_[k] - center_D) / spread_D
        words = _apart_words(names, apart_D) if K > 1 else "All rows"
        words = ". ".join(filter(None, [words, _relation_words(names, mixture.covariances_[k])]))
        deviations_D = np.sqrt(variances_KD[k])
        values = (dict(zip(names, map(float, numbers), strict=True)) for numbers in (mixture.means_[k], deviations_D))
        out.append(Component(float(mixture.weights_[k]), float(own_N.sum()), certainty, *values, f"{words}."))
    return out


def _apart_words(names: Sequence[str], apart_D: Floats) -> str:
    """The three columns in which a component lies farthest from all rows."""
    found = []
    for d in np.argsort(-np.abs(apart_D), kind="stable")[:3]:
        step = next((word for limit, word in STEPS if abs(apart_D[d]) >= limit), None)
        if step is not None:
            found.append(f"{names[d]} {step.format('higher' if apart_D[d] > 0 else 'lower')} than in all rows")
    return "; ".join(found).replace(" than in all rows;", ";") or "Near the middle of all rows in every column"


def _relation_words(names: Sequence[str], covariance_DD: Floats) -> str:
    """The strongest correlation within a component."""
    deviations_D = np.sqrt(np.diag(covariance_DD))
    correlation_DD = np.triu(covariance_DD / np.outer(deviations_D, deviations_D), 1)
    i, j = np.unravel_index(np.abs(correlation_DD).argmax(), correlation_DD.shape)
    value = correlation_DD[i, j]
    if abs(value) < 0.4:
        return ""
    how = "rise together" if value > 0 else "move against each other"
    return f"{names[i]} and {names[j]} {how} (correlation {value:.2f})"


def cautions(mixture: Any, X: Floats, components: list[Component], search: Any = None) -> list[str]:
    """What a reader should be careful about, a sentence each."""
    found = []
    for k, one in enumerate(components, 1):
        if one.rows < FEW_ROWS:
            found.append(f"Component {k} has {one.rows:.3g} row{'s' * (one.rows != 1)}: too few to say much about it.")
        if len(components) > 1 and one.certainty < 0.75:
            found.append(
                f"Component {k} overlaps with others: its rows belong to it with {one.certainty:.0%} on average."
            )
        covariance_DD = mixture.covariances_[k - 1]
        deviations_D = np.sqrt(np.diag(covariance_DD))
        condition = np.linalg.cond(covariance_DD / np.outer(deviations_D, deviations_D))
        if condition > 1e6:
            found.append(f"Component {k} is nearly flat: some columns nearly determine others in it.")
    if not getattr(mixture, "converged_", True):  # a mixture of given parameters was not fitted
        found.append("EM did not converge: more iterations may change the result.")
    sizes = set() if search is None else {one.n_components for one in search.candidates_}
    if len(sizes) > 1 and max(sizes) == len(components):
        found.append(f"The largest number of components that was tried, {max(sizes)}, is the best: try more.")
    missing = float(np.isnan(X).mean())
    if missing > 0:
        found.append(f"{missing:.2%} of the values are missing; they are taken as missing at random.")
    repeated = 1 - len(np.unique(X, axis=0)) / len(X)
    if repeated > 0.2:
        found.append(
            f"{repeated:.0%} of the rows repeat others: rounded or discrete values make components too narrow."
        )
    return found
