"""Who computes experts fastest here: the library, torch's products one by one, or its grouped product.

Usage: python benchmarks/calibrate.py [OUT.json] [--instructions NAME] [--shapes A,B] [--device cuda]. A point is the
least of several rounds of all contestants in turn. On the CPU it is the processor time of one thread, so that what else
runs on the machine counts little; with another instruction set than the best one torch, too, is held to what such a
processor has. In OUT.json the points of other instruction sets, devices and shapes stay.

T tokens, D width, E experts, K slots a token, F expert width.
"""

import argparse
import ctypes
import functools
import json
import os
import time
from pathlib import Path

HELD = {  # what torch and the libraries that it calls read when they are loaded; MKL (float32) does not on AMD
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
THRESHOLD, FRESH = -3, 16 << 20  # glibc: memory of this many bytes is taken from the system each time it is asked for
SHAPES = {"A": (512, 1024, 8, 2), "B": (1024, 512, 64, 8)}  # D, F, E, K
TOKENS = (1, 4, 16, 64, 512)
ROUNDS, LEAST = 3, 0.01  # a contestant's turn takes this many seconds


def seconds(call, device):
    """Of one call, over as many as fill a turn."""
    times, begin = 0, now(device)
    while (spent := now(device) - begin) < LEAST or not times:
        call()
        times += 1
    return spent / times


def now(device):
    """What is measured."""
    if device == "cpu":
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def forward(backend, experts, inputs):
    """Without gradients."""
    with torch.no_grad():
        backend(experts, *inputs)


def training(backend, experts, inputs):
    """Forward, and gradients of everything."""
    hidden_TD, indices_TK, weights_TK = inputs
    leaves = [hidden_TD.detach().requires_grad_(), *experts.parameters()]
    torch.autograd.grad(backend(experts, leaves[0], indices_TK, weights_TK).sum(), leaves)


def points(shapes, device):
    """Rows of the table."""
    for name in shapes:
        D, F, E, K = SHAPES[name]
        for dtype in (torch.float32, torch.bfloat16):
            experts = Experts(E, D, F).to(device, dtype)
            for work in (forward, training):
                for T in TOKENS:
                    torch.manual_seed(T)
                    weights_TK, indices_TK = torch.randn(T, E).softmax(-1).topk(K)
                    inputs = [torch.randn(T, D).to(device, dtype), indices_TK.to(device), weights_TK.to(device)]
                    about = {"shape": name, "dtype": str(dtype).removeprefix("torch."), "work": work.__name__, "T": T}
                    yield about | {"seconds": measured(work, experts, inputs, device)}


def measured(work, experts, inputs, device):
    """Seconds of every contestant, the least of the rounds."""
    contestants = CONTESTANTS if device == "cpu" else {w: b for w, b in CONTESTANTS.items() if w != "native"}
    least = dict.fromkeys(contestants, float("inf"))
    for _ in range(ROUNDS):
        for who, backend in contestants.items():
            least[who] = min(least[who], seconds(functools.partial(work, backend, experts, inputs), device))
    return least


def write(path, rows, device):
    """In place of the points of the same device, instruction set and shapes."""
    which = {"device": device, "instructions": instructions()[0] if device == "cpu" else ""}
    shapes = {row["shape"] for row in rows}
    told = json.loads(path.read_text())["points"] if path.exists() else []
    told = [row for row in told if row["shape"] not in shapes or any(row[name] != which[name] for name in which)]
    rows = sorted(told + [which | row for row in rows], key=lambda row: [row[name] for name in (*which, "shape")])
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.write_text(f'{{\n "threads": 1,\n "points": [\n{lines}\n ]\n}}\n')


def main(options):
    """Print the table, and write it if a name is given."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(THRESHOLD, FRESH)  # as gradients of weights are in training; else chance decides
    if options.instructions:
        use_instructions(options.instructions)
    rows = []
    for row in points(options.shapes.split(","), options.device):
        rows.append(row | {"torch": torch.__version__})
        found = row["seconds"]
        shown = " ".join(f"{who} {1e3 * found[who]:9.3f}" for who in found)
        print(f"{row['shape']} {row['dtype']:8} {row['work']:8} {row['T']:5} {shown} ms", min(found, key=found.get))
    if options.out:
        write(options.out, rows, options.device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--instructions", help="of the library; the best that there is")
    parser.add_argument("--shapes", default="A,B")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    os.environ |= HELD.get(given.instructions, {})

    import torch

    from mixtura.nn import Experts
    from mixtura.nn.backends import sorted_backend
    from mixtura.nn.backends.grouped import grouped_backend
    from mixtura.nn.backends.native import instructions, native_backend, use_instructions

    CONTESTANTS = {"native": native_backend, "sorted": sorted_backend, "grouped": grouped_backend}
    main(given)
