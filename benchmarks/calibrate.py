"""Who computes experts fastest here: the library, torch's products one by one, or its grouped product.

Usage: python benchmarks/calibrate.py [OUT.json]. One thread; a point is the least of several rounds of all contestants
in turn, in seconds of processor time of this thread, so that what else runs on the machine counts little.

T tokens, D width, E experts, K slots a token, F expert width.
"""

import functools
import json
import sys
import time
from pathlib import Path

import torch

from mixtura.bench.layer import SHAPES, random_experts
from mixtura.nn.backends import sorted_backend
from mixtura.nn.backends.grouped import grouped_backend
from mixtura.nn.backends.native import instructions, native_backend

TOKENS = (1, 8, 64, 512)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS, LEAST = 3, 0.01  # a contestant's turn takes this many seconds


CONTESTANTS = {"native": native_backend, "sorted": sorted_backend, "grouped": grouped_backend}


def seconds(call):
    """Of one call, over as many as fill a turn."""
    times, begin = 0, time.thread_time()
    while (spent := time.thread_time() - begin) < LEAST or not times:
        call()
        times += 1
    return spent / times


def forward(backend, experts, inputs):
    """Without gradients."""
    with torch.no_grad():
        backend(experts, *inputs)


def training(backend, experts, inputs):
    """Forward, and gradients of everything."""
    hidden_TD, indices_TK, weights_TK = inputs
    leaves = [hidden_TD.detach().requires_grad_(), *experts.parameters()]
    torch.autograd.grad(backend(experts, leaves[0], indices_TK, weights_TK).sum(), leaves)


def points():
    """Rows of the table."""
    for name, (D, F, E, K) in list(SHAPES.items())[:2]:  # the third is 1.6 GB
        for dtype_name, dtype in DTYPES.items():
            experts = random_experts((D, F, E, K), dtype).requires_grad_(True)
            for work in (forward, training):
                for T in TOKENS:
                    torch.manual_seed(T)
                    weights_TK, indices_TK = torch.randn(T, E).softmax(-1).topk(K)
                    least = measured(work, experts, (torch.randn(T, D).to(dtype), indices_TK, weights_TK))
                    yield {"shape": name, "dtype": dtype_name, "work": work.__name__, "T": T, "seconds": least}


def measured(work, experts, inputs):
    """Seconds of every contestant, the least of the rounds."""
    least = dict.fromkeys(CONTESTANTS, float("inf"))
    for _ in range(ROUNDS):
        for who, backend in CONTESTANTS.items():
            least[who] = min(least[who], seconds(functools.partial(work, backend, experts, inputs)))
    return least


def main():
    """Print the table, and write it if a name is given."""
    torch.set_num_threads(1)
    rows = []
    print(f"{'shape':5} {'type':8} {'work':8} {'T':>5} {' '.join(f'{who:>13}' for who in CONTESTANTS)}  ms; the best")
    for row in points():
        rows.append(row)
        found = row["seconds"]
        shown = " ".join(f"{1e3 * found[who]:13.3f}" for who in CONTESTANTS)
        best = min(found, key=found.get)
        print(f"{row['shape']:5} {row['dtype']:8} {row['work']:8} {row['T']:5} {shown}  {best}", flush=True)
    if sys.argv[1:]:
        told = {"torch": torch.__version__, "instructions": instructions()[0], "threads": 1, "points": rows}
        Path(sys.argv[1]).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
