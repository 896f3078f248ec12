"""Arms on R-LM-S that are in every picture: top-2 routing, random routing, dense layers of equal active and total size.

All arms of a script have the same grid of rates, tried on a seed of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixtura.evidence.lab import Arm, Lab
from mixtura.evidence.rigs.language_training import train
from mixtura.evidence.rigs.text import LOCAL

EXPERTS, WIDTH, SLOTS = 8, 64, 2  # of the mixture that others are compared with; its active width is 128
GRID = {"lr": [1.5e-3, 3e-3, 6e-3]}
FIGURE = "bits per byte"
SETTING = (
    "R-LM-S: byte-level language model (D 64, 2 layers, 4 heads, 8 experts of width 64) on 4 real domains (Python, "
    "C++, German manual pages, Shakespeare), 1200 steps of 16 x 64 bytes, 65,536 held-out bytes; the rate of every arm "
    "is the best of 3 on a seed of its own, seeds are paired"
)
ACTIVE, TOTAL = "dense, equal active size", "dense, equal total size"
RANDOM, TOP2 = "random routing", "top-2, balance 0.01"


def mixture(method: str, *, num_experts: int = EXPERTS, width: int = WIDTH, **options: Any) -> dict[str, Any]:
    """Description of a layer with feed-forward experts and a router."""
    experts = [{"method": "feed-forward", "num_experts": num_experts, "width": width}]
    router = {"method": method, "num_experts": num_experts, **options}
    return {"mixture": {"router": router, "experts": experts}}


def budget(lab: Lab) -> dict[str, Any]:
    """Steps and data of a full run, or of one that only proves that the script runs."""
    return lab.pick({}, smoke={"steps": 3, "domains": list(LOCAL), "rows": 8})


def run(lab: Lab, name: str, layer: Mapping[str, Any], function: Any = train, **config: Any) -> Arm:
    """A tuned arm of this rig."""
    return lab.tuned_arm(name, function, grid=GRID, figure=FIGURE, layer=layer, **budget(lab), **config)


def baselines(lab: Lab) -> None:
    """The four arms that are in every picture."""
    run(lab, TOP2, mixture("topk-softmax", k=SLOTS), balance={"load-balancing": 0.01})
    run(lab, ACTIVE, {"dense": SLOTS * WIDTH})
    run(lab, TOTAL, {"dense": EXPERTS * WIDTH})
    run(lab, RANDOM, mixture("random", k=SLOTS))
