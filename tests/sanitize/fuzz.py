"""Random calls of the native library, to be run on one that was built with sanitizers: ``make sanitize``.

Each call is drawn by the seed and its own number alone, so that one that failed can be repeated without those before.
Calls run in another process, which says what it is about to do: what it said last is what it did when it was ended.
"""

import argparse
import collections
import itertools
import random
import subprocess
import sys
import time
from pathlib import Path

OFTEN = {"experts": 40, "quantized": 20, "tape": 40, "few tokens": 10, "model": 0.3}


def arguments():
    """As they are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="the library, built with sanitizers")
    parser.add_argument("seconds", type=float, help="begin no call later")
    parser.add_argument("--seed", type=int, default=0, help="others draw other calls")
    parser.add_argument("--call", type=int, help="this one alone")
    parser.add_argument("--kind", choices=OFTEN, help="calls of this kind alone")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def work(options):
    """The calls, each announced by a line: its number, what it is, and by which instructions and threads."""
    import calls
    import steps
    import torch

    from mixtura.nn.backends.native import instructions, library, use_instructions

    library.PATH = options.library.resolve()
    if reason := library.why_no_library():
        sys.exit(reason)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not written yet
    kinds = {"experts": calls.experts_call, "quantized": calls.quantized_call} | steps.KINDS
    end = time.monotonic() + options.seconds
    for number in itertools.count() if options.call is None else [options.call]:
        if time.monotonic() > end and options.call is None:
            return
        rng = random.Random(f"{options.seed} {number}")
        kind = options.kind or rng.choices([*OFTEN], [*OFTEN.values()])[0]
        name, threads = rng.choice(instructions()[1]), rng.randint(1, 4)
        print(number, kind, f"on {name} by {threads} threads", sep="\t", flush=True)
        torch.manual_seed(rng.randint(0, 1 << 30))
        torch.set_num_threads(threads)
        use_instructions(name)
        with torch.no_grad():
            kinds[kind](rng)


def watch(options):
    """Count what the other process does, and say what it did last if it fails."""
    done, last = collections.Counter(), "nothing"
    with subprocess.Popen([sys.executable, *sys.argv, "--work"], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            number, kind, how = line.rstrip().split("\t")
            done[kind, how.split()[1]] += 1
            last = f"call {number}, {kind} {how}: to be repeated by --seed {options.seed} --call {number}"
            last += f" --kind '{options.kind}'" if options.kind else ""
    for (kind, name), count in sorted(done.items()):
        print(f"{count} calls of {kind} on {name}")
    if process.returncode:
        sys.exit(f"failed: {last}")
    print("nothing found")


if __name__ == "__main__":
    given = arguments()
    (work if given.work else watch)(given)
