"""Results of evidence that are made up, for tests of the pages."""

from mixtura.evidence import Result

FIGURE = {"mean": 0.25, "low": 0.125, "high": 0.375, "seeds": [0.2, 0.25, 0.3]}


def arm(name, **options):
    cost = {"total parameters": 12345.0, "seconds": 1.23456}
    return {"name": name, "config": {"width": 64}, "tuned": [], "cost": cost, "figures": {"loss": FIGURE}, **options}


def result(key="expert-choice", **options):
    fields = {
        "key": key,
        "claim": "Experts that choose are better.",
        "source": "Zhou et al., arXiv:2202.09368, fig. 2; a book",
        "figure": "loss, lower is better",
        "setting": "A sum of two numbers.",
        "command": f"mixtura evidence {key}",
        "date": "2026-01-02",
        "machine": {"system": "Linux", "architecture": "x86_64", "cores": 2},
        "versions": {"python": "3.11", "torch": "2.9"},
        "seeds": (0, 1, 2),
        "script": "0",
        "code": {},
        "arms": (arm("experts choose"), arm("tokens | choose", tuned=[{"rate": 0.1, "loss": 0.3}] * 2)),
        "differences": (
            {
                "figure": "loss",
                "of": "experts choose",
                "against": "tokens | choose",
                "mean": 0.0,
                "low": -1.0,
                "high": 1.0,
            },
        ),
        "verdict": "does not hold here",
        "sentence": "The difference is 0 (-1 to 1).",
    }
    return Result(**{**fields, **options})
