"""Means over seeds, how sure they are, and how small a difference can be seen at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mixtura.core.errors import OptionError

# Student's t, two-sided 95 %, by degrees of freedom; 1.96 beyond.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
# The same, one-sided 80 %, for the power of a test.
_T80 = (1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883, 0.879, 0.876, 0.873, 0.870, 0.868, 0.866)


class Interval(NamedTuple):
    """A mean over seeds with its 95 % interval (Student's t); of one seed the interval is without bounds."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of values that are drawn alike.

    Raises:
        OptionError: if there are none.
    """
    if not values:
        raise OptionError("an interval needs at least one value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = _quantile(_T95, len(values) - 1, 1.960) * deviation(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample of at least two."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def smallest_difference(spread: float, seeds: int) -> float:
    """Difference of means that paired seeds show in four of five tries (two-sided 5 %, power 80 %).

    Args:
        spread: standard deviation of the differences of one seed.
        seeds: at least 2.
    """
    freedom = seeds - 1
    factor = _quantile(_T95, freedom, 1.960) + _quantile(_T80, freedom, 0.842)
    return factor * spread / math.sqrt(seeds)


def _quantile(table: Sequence[float], freedom: int, beyond: float) -> float:
    return table[freedom - 1] if freedom <= len(table) else beyond
