"""``Lab``: where a script runs its arms.

An arm is a function with a configuration, run once for each seed. Runs are cached by the code that they use, their
configuration and their seed, so that a baseline which several scripts have is computed once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from mixtura.core.errors import OptionError, unknown_name
from mixtura.evidence.intervals import Interval, interval
from mixtura.evidence.runs import Runner

COSTS = ("total parameters", "active parameters", "flops", "memory bytes", "seconds")
TUNING = 1_000_000  # seeds from here on choose settings; they are never reported

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way that was tried.

    Attributes:
        name: for people.
        config: what the function was called with, besides the seed.
        runs: figures of every seed.
        tuned: settings that were tried first, each with the figure of the seed that chose.
    """

    name: str
    config: Mapping[str, Any]
    runs: tuple[Mapping[str, float], ...]
    tuned: tuple[Mapping[str, Any], ...] = ()

    def values(self, figure: str) -> list[float]:
        """A figure of every seed.

        Raises:
            UnknownNameError: with the nearest figure.
        """
        if figure not in self.runs[0]:
            raise unknown_name(f"figure of arm {self.name!r}", figure, self.runs[0])
        return [run[figure] for run in self.runs]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One arm minus another, paired by seed."""

    figure: str
    of: str
    against: str
    interval: Interval


class Lab:
    """Runs and remembers arms.

    Args:
        runner: computes runs or takes them from the cache.
        seeds: that every arm runs with.
        smoke: whether this only proves that the script runs.
    """

    def __init__(self, runner: Runner, seeds: Sequence[int], *, smoke: bool = False) -> None:
        self.runner, self.seeds, self.smoke = runner, tuple(seeds), smoke
        self.arms: dict[str, Arm] = {}
        self.differences: list[Difference] = []

    def pick(self, full: Value, smoke: Value) -> Value:
        """The value for a full run, or the one for a run that only proves that the script runs."""
        return smoke if self.smoke else full

    def arm(self, name: str, function: Callable[..., Mapping[str, float]], **config: Any) -> Arm:
        """Run an arm with every seed.

        Args:
            name: of the arm, new in this lab.
            function: of the script or of a rig; takes ``seed`` and the configuration, returns figures by name. Those
                in ``COSTS`` are what a run costs; "seconds", of the processor, are measured here.
            **config: plain JSON.

        Raises:
            OptionError: if the name is taken.
        """
        return self._add(name, config, self.runner.run(function, [(config, seed) for seed in self.seeds]))

    def tuned_arm(
        self,
        name: str,
        function: Callable[..., Mapping[str, float]],
        *,
        grid: Mapping[str, Sequence[Any]],
        figure: str,
        **config: Any,
    ) -> Arm:
        """Run an arm with the setting of a grid that is best on a seed of its own.

        Args:
            name: of the arm.
            function: see ``arm``.
            grid: values by the name of an option; all combinations are tried. Arms that are compared get the same.
            figure: which is to be small.
            **config: the other options.

        Raises:
            OptionError: if the name is taken.
        """
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        if self.smoke:
            return self.arm(name, function, **config, **points[0])
        tried = self.runner.run(function, [({**config, **point}, TUNING) for point in points])
        tuned = tuple({**point, figure: run[figure]} for point, run in zip(points, tried, strict=True))
        best = points[min(range(len(points)), key=lambda n: tuned[n][figure])]
        runs = self.runner.run(function, [({**config, **best}, seed) for seed in self.seeds])
        return self._add(name, {**config, **best}, runs, tuned)

    def _add(self, name: str, config: Mapping[str, Any], runs: Sequence[Mapping[str, float]], tuned: Any = ()) -> Arm:
        if name in self.arms:
            raise OptionError(f"arm {name!r} was run already")
        self.arms[name] = Arm(name, config, tuple(runs), tuned)
        return self.arms[name]

    def mean(self, figure: str, name: str) -> float:
        """Mean of a figure of an arm over the seeds; raises as ``difference``."""
        return interval(self._arm(name).values(figure)).mean

    def difference(self, figure: str, of: str, against: str) -> Interval:
        """One arm minus another, paired by seed, with its 95 % interval; it is also kept in the result.

        Raises:
            UnknownNameError: for an arm or a figure that is not there.
        """
        pairs = zip(self._arm(of).values(figure), self._arm(against).values(figure), strict=True)
        found = interval([one - other for one, other in pairs])
        self.differences.append(Difference(figure, of, against, found))
        return found

    def _arm(self, name: str) -> Arm:
        if name not in self.arms:
            raise unknown_name("arm", name, self.arms)
        return self.arms[name]
