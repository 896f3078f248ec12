"""What a run of evidence leaves: one JSON file, checked when it is read, and compared with the code that is here."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mixtura
from mixtura.core.errors import FileFormatError
from mixtura.core.files import write_file
from mixtura.evidence.claims import VERDICTS, Claim, Verdict
from mixtura.evidence.code import digests, script_digest
from mixtura.evidence.intervals import Interval, interval
from mixtura.evidence.lab import COSTS, Arm, Lab

PACKAGES = ("torch", "transformers", "numpy", "scikit-learn", "scipy")


@dataclasses.dataclass(frozen=True)
class Result:
    """One claim as it was measured; the fields of the JSON file.

    Attributes:
        key: of the method.
        claim: as ``Claim``; so are source, figure and setting.
        source: where it was published.
        figure: main figure.
        setting: data, sizes, budget.
        command: that repeats it.
        date: of the run.
        machine: what it ran on.
        versions: of packages.
        seeds: of every arm.
        script: digest of the script.
        code: digest by module that its runs used.
        arms: name, config, tuned, cost (mean by name), figures (mean, low, high, seeds by name).
        differences: figure, of, against, mean, low, high.
        verdict: one of ``VERDICTS``.
        sentence: what it rests on.
    """

    key: str
    claim: str
    source: str
    figure: str
    setting: str
    command: str
    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    seeds: tuple[int, ...]
    script: str
    code: Mapping[str, str]
    arms: tuple[Mapping[str, Any], ...]
    differences: tuple[Mapping[str, Any], ...]
    verdict: str
    sentence: str


def describe(claim: Claim, lab: Lab, verdict: Verdict, script: Path) -> Result:
    """The result of a claim that was measured by a script."""
    return Result(
        key=claim.key,
        claim=claim.claim,
        source=claim.source,
        figure=claim.figure,
        setting=claim.setting,
        command=f"mixtura evidence {claim.key}",
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine={"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()},
        versions={"python": platform.python_version(), "mixtura": mixtura.__version__, **_versions()},
        seeds=lab.seeds,
        script=script_digest(script),
        code=lab.runner.code,
        arms=tuple(_arm(arm) for arm in lab.arms.values()),
        differences=tuple(
            {"figure": d.figure, "of": d.of, "against": d.against, **_told(d.interval)} for d in lab.differences
        ),
        verdict=verdict.verdict,
        sentence=verdict.sentence,
    )


def _versions() -> dict[str, str]:
    known = {name: importlib.util.find_spec(name.replace("scikit-learn", "sklearn")) for name in PACKAGES}
    return {name: importlib.metadata.version(name) for name, spec in known.items() if spec}


def _arm(arm: Arm) -> dict[str, Any]:
    costs = {name: interval(arm.values(name)).mean for name in COSTS if name in arm.runs[0]}
    figures = {
        name: {**_told(interval(arm.values(name))), "seeds": arm.values(name)}
        for name in arm.runs[0]
        if name not in COSTS
    }
    return {"name": arm.name, "config": arm.config, "tuned": list(arm.tuned), "cost": costs, "figures": figures}


def _told(found: Interval) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}


def write_result(result: Result, path: Path) -> None:
    """Write a result beside, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_file(path) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> Result:
    """Read and check a result.

    Raises:
        FileFormatError: if it is not what ``write_result`` writes.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        result = Result(**told)
    except (OSError, ValueError, TypeError) as error:
        raise FileFormatError(f"{str(path)!r} is no result of evidence: {error}") from None
    if result.verdict not in VERDICTS or not result.sentence or (not result.arms and result.verdict != VERDICTS[3]):
        raise FileFormatError(f"{str(path)!r} has no verdict with a sentence and arms")
    seeds = {len(figure["seeds"]) for arm in result.arms for figure in arm["figures"].values()}
    if seeds - {len(result.seeds)} or len(result.seeds) < 3:
        raise FileFormatError(f"{str(path)!r}: every figure needs the value of each of at least 3 seeds")
    return result


def read_results(folder: Path) -> dict[str, Result]:
    """All results of a folder, by key; raises as ``read_result``."""
    found = [read_result(path) for path in sorted(folder.glob("*.json"))]
    return {result.key: result for result in found}


def check(result: Result, scripts: Mapping[str, Path]) -> list[str]:
    """What has changed since a result was measured; empty if nothing has.

    Args:
        result: to check.
        scripts: file by key, of all scripts that are here.
    """
    if result.key not in scripts:
        return ["its script is gone"]
    path = scripts[result.key]
    own = {name: path for name in result.code if name.startswith("mixtura_evidence_")}
    now = digests([name for name in result.code if name not in own], {})
    judged = ["its script has changed"] if script_digest(path) != result.script else []
    return judged + [_changed(name, digest) for name, digest in now.items() if digest != result.code[name]]


def _changed(name: str, digest: str) -> str:
    return f"{name} has changed" if digest else f"{name} is gone"


def summary(results: Iterable[Result]) -> list[str]:
    """A line for every result: key, verdict, sentence."""
    return [f"{result.key:24} {result.verdict:20} {result.sentence}" for result in results]
