"""What a script of evidence declares: a claim, the function that measures it, and a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from mixtura.core.errors import OptionError

if TYPE_CHECKING:
    from mixtura.evidence.lab import Lab

VERDICTS = ("holds", "partly", "does not hold here", "not testable here")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        verdict: one of ``VERDICTS``.
        sentence: one honest sentence with the numbers that it rests on.

    Raises:
        OptionError: for another verdict, or without a sentence.
    """

    verdict: str
    sentence: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise OptionError(f"verdict must be one of {', '.join(map(repr, VERDICTS))}, got {self.verdict!r}")
        if not self.sentence.strip():
            raise OptionError(f"verdict {self.verdict!r} needs a sentence that says what it rests on")


Measure: TypeAlias = "Callable[[Lab], Verdict]"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published claim and how it is measured here.

    Attributes:
        key: of the method; the script's name.
        claim: one sentence.
        source: where it was published.
        figure: the main figure of all arms, its unit and direction, as "bits per byte, lower is better".
        setting: data, sizes and budget, and what differs from the source.
        seeds: how many.
        measure: runs the arms in a lab.
    """

    key: str
    claim: str
    source: str
    figure: str
    setting: str
    seeds: int
    measure: Measure


def evidence(
    key: str, *, claim: str, source: str, figure: str, setting: str, seeds: int = 3
) -> Callable[[Measure], Claim]:
    """Declare what a script measures; the function becomes a ``Claim``.

    Args:
        key: of the method; the script's name.
        claim: see ``Claim``, as the others.
        source: where it was published.
        figure: main figure, unit, direction.
        setting: data, sizes, budget.
        seeds: at least 3.

    Raises:
        OptionError: if there are fewer than 3 seeds.
    """
    if seeds < 3:
        raise OptionError(f"seeds must be at least 3, got {seeds}")
    return lambda measure: Claim(key, claim, source, figure, setting, seeds, measure)
