"""Evidence: published claims as runs that anyone can repeat, with a verdict.

A script ``evidence/<key>.py`` holds a claim and a function that measures it in a ``Lab``; ``mixtura evidence KEY`` runs
it and writes ``results/<key>.json`` beside.
"""

from mixtura.evidence.claims import VERDICTS, Claim, Verdict, evidence
from mixtura.evidence.intervals import Interval, interval
from mixtura.evidence.lab import Lab
from mixtura.evidence.results import Result, check, read_results
from mixtura.evidence.scripts import find_scripts, load_script, run_script

__all__ = [
    "VERDICTS",
    "Claim",
    "Interval",
    "Lab",
    "Result",
    "Verdict",
    "check",
    "evidence",
    "find_scripts",
    "interval",
    "load_script",
    "read_results",
    "run_script",
]
