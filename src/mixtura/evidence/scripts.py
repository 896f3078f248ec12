"""Finding, loading and running the scripts of evidence."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

from mixtura.core.errors import FileFormatError, OptionError, unknown_name
from mixtura.evidence.claims import Claim
from mixtura.evidence.lab import Lab
from mixtura.evidence.results import Result, describe, read_results, write_result
from mixtura.evidence.runs import Runner

PREFIX = "mixtura_evidence_"


def folder() -> Path:
    """Where the scripts are: beside the package's source, or in the installed package.

    Raises:
        OptionError: if they are in neither.
    """
    package = Path(__file__).parent
    for place in (package.parents[2] / "evidence", package / "scripts"):
        if place.is_dir():
            return place
    raise OptionError("the scripts of evidence are not installed with this package; run in a checkout of mixtura")


def find_scripts() -> dict[str, Path]:
    """Scripts by key."""
    return {path.stem: path for path in sorted(folder().glob("*.py"))}


def known_results() -> dict[str, Result]:
    """Results that are there, by key; raises as ``read_results``."""
    return read_results(folder() / "results")


def load_module(path: Path) -> types.ModuleType:
    """The module of a script, loaded once."""
    name = PREFIX + path.stem.replace("-", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def load_script(key: str) -> Claim:
    """The claim of a script.

    Raises:
        UnknownNameError: with the nearest key.
        FileFormatError: if the file declares no claim of that key.
    """
    scripts = find_scripts()
    if key not in scripts:
        raise unknown_name("evidence", key, scripts)
    claims = [value for value in vars(load_module(scripts[key])).values() if isinstance(value, Claim)]
    if [claim.key for claim in claims] != [key]:
        raise FileFormatError(f"{str(scripts[key])!r} must declare one claim of key {key!r}")
    return claims[0]


def run_script(
    key: str, *, smoke: bool = False, jobs: int = 2, out: Path | None = None, say: Callable[[str], None] = print
) -> Result:
    """Measure a claim, and write the result.

    Args:
        key: of the script.
        smoke: whether it is only to be proven that the script runs: the smallest budget, one seed, no tuning, nothing
            written unless ``out`` is given.
        jobs: processes.
        out: folder of the result; None is ``results`` beside the scripts.
        say: called with a line after every run.

    Raises:
        UnknownNameError: as ``load_script``, which also raises FileFormatError.
    """
    claim, path = load_script(key), find_scripts()[key]
    with Runner(path, jobs=0 if smoke else jobs, say=say) as runner:
        lab = Lab(runner, range(1 if smoke else claim.seeds), smoke=smoke)
        verdict = claim.measure(lab)
        result = describe(claim, lab, verdict, path)
    if out is not None or not smoke:
        write_result(result, (out or folder() / "results") / f"{key}.json")
    return result
