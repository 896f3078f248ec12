"""The figure of all routers: which arms are in it, and that it is well-formed."""

import xml.etree.ElementTree as ET

from mixtura.evidence import Result
from mixtura.evidence.figure import points, quality_by_operations

BITS = "bits per byte"


def arm(name, config, mean, *, tuned=True, figure=BITS, **cost):
    told = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "seeds": [mean] * 3}
    return {
        "name": name,
        "config": config,
        "tuned": [{"lr": 1.0}] * tuned,
        "cost": {"flops": 1000.0 + 100 * mean, **cost},
        "figures": {figure: told},
    }


def result(key, *arms):
    text = dict.fromkeys(
        ("claim", "source", "figure", "setting", "command", "date", "verdict", "sentence", "script"), ""
    )
    empty = {"machine": {}, "versions": {}, "code": {}, "differences": ()}
    return Result(key=key, seeds=(0, 1, 2), arms=arms, **text, **empty)


DENSE = arm("dense", {"layer": {"dense": 128}}, 3.3)
RESULTS = [
    result("one", DENSE, arm("mine", {"layer": {"mixture": 1}}, 3.1)),
    result(
        "two",
        DENSE,
        arm("<yours>", {"layer": {"mixture": 2}}, 3.2),
        arm("not tuned", {"layer": {"mixture": 3}}, 3.0, tuned=False),
        arm("another budget", {"steps": 3}, 3.0),
        arm("another figure", {"layer": {"mixture": 4}}, 3.0, figure="test error, %"),
    ),
]


def test_comparable_arms_are_shown_once_and_the_best_first():
    told = [(point.name, point.is_baseline) for point in points(RESULTS)]
    assert told == [("one: mine", False), ("two: <yours>", False), ("dense", True)]


def test_the_figure_is_well_formed_and_names_every_point():
    root = ET.fromstring(quality_by_operations(RESULTS))
    words = " ".join(root.itertext())
    assert all(word in words for word in ("one: mine", "two: <yours>", "dense", BITS, "thousand operations a token"))
    circles = [float(part.get("cy")) for part in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert circles == sorted(circles, reverse=True)  # fewer bits are lower


def test_without_results_there_is_no_figure():
    assert quality_by_operations([]) == ""
