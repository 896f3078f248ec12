"""Writes what docs/speed.md says under "Measured", and its plots, from results/*.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plots

from mixtura.bench.decode import STOCK
from mixtura.bench.layer import ROUNDED, SHAPES, TOKENS
from mixtura.bench.layer import STOCK as STOCK_LAYER
from mixtura.bench.measuring import QUIET
from mixtura.bench.memory import FEW_BITS
from mixtura.bench.report import OURS, SMALLER, markdown
from mixtura.bench.train import TWIN

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HEADING = "\n## Measured\n"
TITLES = {
    "layer": "One layer of SwiGLU experts, forward",
    "decode": "Decode steps",
    "prefill": "Prompts",
    "train": "Training steps",
    "memory": "Memory, and the first token",
    "limits": "Limits",
}
BESIDE = {"train": [TWIN], "memory": list(FEW_BITS)}
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
    "memory": "From `from_pretrained` to the first token after a prompt of L tokens, in a process of its own, and the "
    "most memory that it had (all of it, libraries and mapped files too; 1.3 B parameters in bfloat16 are 2.7 GB). Few "
    "bits are loaded from a folder that was saved with them. Medians of three processes each.",
    "limits": "What torch makes of products of matrices and of one vector, and how fast the library reads 512 MB.",
}
# Of cases with few bits: words, and who stands beside.
FEW = {
    "decode": (
        "With 8 and 4 bits, beside llama.cpp's Q8_0 and Q4_0: groups of 32, the output matrix too. The cosine is that "
        "of the logits of the first step with those of all bits; weights are random, so real models come off better.",
        [STOCK],
    ),
    "layer": (
        "With 8 and 4 bits, ours in groups of 32. onnxruntime has the same codes; zentorch one scale for a whole row, "
        "and, as onnxruntime, tokens rounded to 8 bits. With 8 bits ours keeps 16 bits of a token unless told "
        "otherwise, which is a column of its own. Relative errors of A at T = 8: ours 1.0 %, with tokens of 8 bits "
        "1.5 %, onnxruntime 1.5 %, zentorch 2.6 %.",
        [ROUNDED, STOCK_LAYER],
    ),
}
WHY = {
    "layer": " vLLM's sgl and zentorch pack weights into tiles of the processor's instructions and keep the packed "
    "ones; ours reads rows as they lie, so that the model can be trained, saved and merged. That costs a sum over the "
    "lanes of a vector for each output, and most where weights are in the cache (A, and B at T = 1); there 30 to 40 "
    "microseconds of Python count, too. At T >= 512 both are near the product of matrices. With 8 bits, products of "
    "blocks of 32 inputs are scaled one by one, which a scale for a whole row spares.",
}
INTRO = """
Everything here is from `mixtura bench`, whose files lie in `benchmarks/results`; `benchmarks/peers` tells who the
others are and how they are timed. Each cell is a median over seven rounds or more in which all take turns; only
ratios within a row mean something, since this machine gives more or less from minute to minute. Where memory decides,
even they vary: the host reads some of its memory at twice the speed of other, and every program has its luck. A ratio
above 1 is better than the best peer. A star marks cases in which other programs used the machine all the while: they
say little. Cases that `mixtura bench` has and no table shows have not been measured on a quiet machine yet.

"""


def written(results: Path, text: str) -> dict[str, str]:
    """Files of the docs by name: the page that has this text, and plots. Without results nothing changes."""
    told = {kind: json.loads(path.read_text("utf-8")) for kind in TITLES if (path := results / f"{kind}.json").exists()}
    if not told:
        return {"speed.md": text}
    drawn = {f"speed-{kind}.svg": draw(told[kind]) for kind, draw in PLOTS.items() if kind in told}
    before, heading, _ = text.partition(HEADING)
    parts = [_part(kind, one, f"speed-{kind}.svg" in drawn) for kind, one in told.items()]
    page = before.rstrip() + "\n" + (heading or HEADING) + INTRO + "\n\n".join(parts)
    return {"speed.md": page.rstrip() + "\n", **drawn}


def _part(kind: str, told: Mapping[str, Any], drawn: bool) -> str:
    parts = [f"### {TITLES[kind]}", WORDS[kind], _circumstances(told)]
    if drawn:
        parts.append(f"![{TITLES[kind]}](speed-{kind}.svg)")
    few = [row for row in told["rows"] if "/int" in row["case"]]
    all_bits = [row for row in told["rows"] if row not in few]
    parts.append(markdown({**told, "rows": all_bits}, BESIDE.get(kind, ())))
    if few:
        words, beside = FEW[kind]
        parts += [words, markdown({**told, "rows": few}, beside)]
    if behind := _behind(told["rows"]):
        parts.append(f"Behind the best peer: {behind}.{WHY.get(kind, '')}")
    return "\n\n".join(parts)


def _behind(rows: list[dict[str, Any]]) -> str:
    """Cases in which the best peer is better, with the ratio."""
    ours = {row["case"]: row["vs_best_peer"] for row in rows if row["who"] == OURS}
    return ", ".join(f"`{case}` ({ratio:.2f})" for case, ratio in ours.items() if ratio is not None and ratio < 1)


def _circumstances(told: Mapping[str, Any]) -> str:
    machine, versions = told["machine"], told["versions"]
    quiet = {True: "the machine was quiet", False: "the machine was not quiet in all rounds"}.get(told["quiet"])
    names = [f"{name} {version}" for name, version in versions.items() if name not in ("python", "numpy")]
    where = f"{machine.get('processor', '')} (family {machine.get('family')}), {machine['threads']} threads"
    clock = "by the processor's clock, " if told["clock"] == "processor" else ""
    quiet = quiet or "whether the machine was quiet is not known"
    return f"{told['date']}, {clock}{where}, {', '.join(names)}; {quiet}."


def _speeds(told: Mapping[str, Any], case: str) -> dict[str, float]:
    """Of each contestant, more is better."""
    rows = [row for row in told["rows"] if row["case"] == case]
    return {row["who"]: 1 / row["value"] if row["unit"] in SMALLER else row["value"] for row in rows}


def _is_sure(told: Mapping[str, Any], case: str) -> bool:
    return bool((told["foreign"].get(case) or 0) < QUIET)


def _relative(told: Mapping[str, Any], case: str) -> dict[str, float]:
    """Speed of each, that of the best of transformers being 1; of transformers only the best."""
    speeds = _speeds(told, case)
    stock = {who: v for who, v in speeds.items() if who.startswith("transformers ") and "+" not in who}
    stock = stock or {"transformers": speeds.get("transformers", math.nan)}
    others = {who: v for who, v in speeds.items() if who not in stock}
    return {who: v / max(stock.values()) for who, v in {**others, "transformers": max(stock.values())}.items()}


def _layer(told: Mapping[str, Any]) -> str:
    panels: dict[str, dict[str, list[tuple[float, bool]]]] = {}
    for shape in SHAPES:
        of = {T: f"{shape}/bf16/T{T}" for T in TOKENS}
        at = {T: _relative(told, case) if case in told["foreign"] else {} for T, case in of.items()}
        names = dict.fromkeys(who for one in at.values() for who in one)
        if names:
            panels[f"{shape}, bfloat16"] = {
                who: [(one.get(who, math.nan), bool(one) and _is_sure(told, of[T])) for T, one in at.items()]
                for who in sorted(names, key=list(plots.COLORS).index, reverse=True)
            }
    title = "Speed of one layer of experts relative to the best of transformers (higher is better)"
    return plots.lines(title, panels, [str(T) for T in TOKENS], "tokens; hollow points: others used the machine")


def _decode(told: Mapping[str, Any]) -> str:
    groups: dict[str, dict[str, tuple[float, str, bool]]] = {}
    for row in sorted(told["rows"], key=lambda row: list(plots.COLORS).index(row["who"].removesuffix(", bf16"))):
        if row["who"] != STOCK:
            label = f"{row['value']:.3g} tok/s"
            groups.setdefault(row["case"], {})[row["who"]] = (row["of_limit"], label, _is_sure(told, row["case"]))
    groups = {case: groups[case] for case in told["foreign"] if case in groups}
    reach = max(1.1, *(one[0] for group in groups.values() for one in group.values()))
    return plots.bars(
        "Decode steps: part of what reading weights and cache once allows (longer is better)", groups, reach
    )


def _train(told: Mapping[str, Any]) -> str:
    groups = {}
    for case in told["foreign"]:
        speeds = _speeds(told, case)
        best = max(v for who, v in speeds.items() if who.startswith("transformers "))
        groups[case] = {who: (v / best, f"{v:.0f} tok/s", _is_sure(told, case)) for who, v in speeds.items()}
    reach = max(2.0, *(one[0] for group in groups.values() for one in group.values()))
    return plots.bars("Training steps relative to the best of transformers (longer is better)", groups, reach)


PLOTS = {"layer": _layer, "decode": _decode, "train": _train}


if __name__ == "__main__":
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    for name, content in written(ROOT / "benchmarks" / "results", page).items():
        (DOCS / name).write_text(content, encoding="utf-8")
