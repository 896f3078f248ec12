"""Writes the tables of docs/speed.md, all that follows its heading "Measured", from results/*.json."""

from __future__ import annotations

import json
from pathlib import Path

from mixtura.bench.report import markdown
from mixtura.bench.train import TWIN

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "speed.md"
HEADING = "\n## Measured\n"
TITLES = {
    "layer": "One layer of SwiGLU experts, forward",
    "decode": "Decode steps",
    "prefill": "Prompts",
    "train": "Training steps",
    "limits": "Limits",
}
WORDS = {
    "layer": "Milliseconds. A: 8 experts of 512 x 1024, 2 a token; B: 64 of 1024 x 512, 8 a token; C: 64 of "
    "2048 x 1024, 8 a token (OLMoE's own). The limit is that of the same rounds: a product of matrices, or reading the "
    "weights of the experts that were chosen, whichever takes longer; what lies in the cache is read faster than that.",
    "decode": "Tokens a second of all sequences, after L positions of each of B sequences. The 1.3 B mixture has the "
    "shape of a Qwen3-MoE (12 layers, 64 experts, 8 a token, 0.22 B active), the dense one that of Llama 3.2 1B; "
    "weights and tokens are random. The limit is reading weights and cache once.",
    "prefill": "Tokens a second of one prompt of L tokens. The limit is a product of matrices.",
    "train": "Tokens a second; 8 layers of width 256, 8 experts, 2 a token, 29 M parameters, 2048 tokens a step, "
    "AdamW. bf16 is autocast, bf16-weights has weights in bfloat16. The dense twin has the size of what is active.",
    "limits": "What torch makes of products of matrices and of one vector, and how fast the library reads 512 MB.",
}
INTRO = """
Everything here is from `mixtura bench`, whose files lie in `benchmarks/results`; `benchmarks/peers` tells who the
others are and how they are timed. Each cell is a median over seven rounds or more in which all take turns; only ratios
within a row mean something, since this machine gives more or less from minute to minute. A ratio above 1 is better than
the best peer. A star marks cases in which other programs used the machine all the while: they say little.

"""


def measured(results: Path) -> str:
    """The tables of all results that are there."""
    parts = []
    for kind, title in TITLES.items():
        path = results / f"{kind}.json"
        if path.exists():
            told = json.loads(path.read_text(encoding="utf-8"))
            parts.append(f"### {title}\n\n{WORDS[kind]}\n\n{_circumstances(told)}\n\n")
            parts.append(markdown(told, [TWIN] if kind == "train" else []) + "\n\n")
    return "".join(parts).rstrip() + "\n"


def _circumstances(told: dict) -> str:
    machine, versions = told["machine"], told["versions"]
    quiet = {True: "the machine was quiet", False: "the machine was not quiet in all rounds"}.get(told["quiet"])
    names = [f"{name} {version}" for name, version in versions.items() if name not in ("python", "numpy")]
    where = f"{machine.get('processor', '')} (family {machine.get('family')}), {machine['threads']} threads"
    return f"{told['date']}, {where}, {', '.join(names)}; {quiet or 'whether the machine was quiet is not known'}."


def page(text: str, results: Path) -> str:
    """The page with its tables."""
    before, heading, _ = text.partition(HEADING)
    return before.rstrip() + "\n" + (heading or HEADING) + INTRO + measured(results)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), ROOT / "benchmarks" / "results"), encoding="utf-8")
