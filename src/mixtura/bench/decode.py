"""Decode steps of language models, with tokens that are given: what a step costs, without sampling or ``generate``.

B sequences, L positions that are there already.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mixtura.bench.contest import Contest, cosines, relative_errors
from mixtura.bench.limits import READ_BYTES, Read
from mixtura.bench.measuring import CLOCKS, Contestant, Watch, interleave
from mixtura.bench.models import SHAPES, UPCYCLED, make_model, step_bytes, twin
from mixtura.bench.report import Case
from mixtura.core.errors import FetchError, MixturaWarning

CASES = (
    ("moe-1.3b", 16, 512, 1),
    ("moe-1.3b", 16, 4096, 1),
    ("moe-1.3b", 16, 512, 8),
    ("dense-1.1b", 16, 512, 1),
    ("dense-1.1b", 16, 4096, 1),
    (UPCYCLED, 16, 512, 1),
    ("moe-1.3b", 8, 512, 1),
    ("moe-1.3b", 8, 512, 8),
    ("moe-1.3b", 4, 512, 1),
    ("moe-1.3b", 4, 512, 8),
    ("dense-1.1b", 8, 512, 1),
    ("dense-1.1b", 4, 512, 1),
)
_TYPES = {16: "bf16", 8: "int8", 4: "int4"}
STOCK = "transformers, bf16"  # beside few bits
_FOLLOWING = 256  # tokens that are given after the prompt, over and over
_BURST = 0.4  # seconds


def decode(
    watch: Watch,
    peers: Mapping[str, Path],
    versions: dict[str, str],
    *,
    wanted: Callable[[str], bool],
    rounds: int,
    cases: tuple[tuple[str, int, int, int], ...] = CASES,
    shapes: dict[str, tuple[str, dict[str, Any]]] = SHAPES,
    read_bytes: int = READ_BYTES,
) -> Iterator[Case]:
    """Time decode steps; a value is tokens a second, of all sequences together.

    With few bits, ours is compared with llama.cpp at the same bits (groups of 32 with a scale in float16, the output
    matrix too); transformers with all bits stands beside, and is what errors and cosines of logits refer to.

    Args:
        watch: over the machine.
        peers: interpreters by name; llama.cpp takes part.
        versions: those of the peers are added.
        wanted: whether a case of that name is.
        rounds: as in ``interleave``.
        cases: model, bits, L, B.
        shapes: of the models.
        read_bytes: size of the memory that is read for the limit.

    Warns:
        MixturaWarning: if a model is not in the cache; its cases are left out.
    """
    for model_name, bits in dict.fromkeys((name, bits) for name, bits, _, _ in cases):
        sizes = [(L, B) for *which, L, B in cases if which == [model_name, bits]]
        names = {f"{model_name}/{_TYPES[bits]}/L{L}/B{B}": (L, B) for L, B in sizes}
        names = {name: sizes for name, sizes in names.items() if wanted(name)}
        if names:
            watch.release()
            try:
                model = make_model(model_name, shapes)
            except FetchError as error:
                warnings.warn(f"without {model_name}: {error}", MixturaWarning, stacklevel=2)
                continue
            yield from _of_model(model, bits, names, watch, peers, versions, rounds, read_bytes)
            del model


def _of_model(
    model: Any,
    bits: int,
    names: Mapping[str, tuple[int, int]],
    watch: Watch,
    peers: Mapping[str, Path],
    versions: dict[str, str],
    rounds: int,
    read_bytes: int,
) -> Iterator[Case]:
    """Cases of one model, which is gone before the next is made."""
    with contextlib.ExitStack() as stack:
        contest = Contest(model, stack, watch)
        contest.invite_llama(peers, versions, bits)
        if bits == 16:
            accelerated = contest.accelerated(twin(model))
        else:
            accelerated = contest.accelerated(copy.deepcopy(model), bits=bits)
        read = Read("read", read_bytes)
        for name, (L, B) in names.items():
            yield _case(contest, accelerated, bits, name, L, B, watch, rounds, read)


def _case(
    contest: Contest, accelerated: Any, bits: int, name: str, L: int, B: int, watch: Watch, rounds: int, read: Read
) -> Case:
    watch.release()
    generator = torch.Generator().manual_seed(L + B)
    vocabulary = contest.model.config.vocab_size
    prompts_BL = torch.randint(0, vocabulary, (B, L), generator=generator)
    following_NB = torch.randint(0, vocabulary, (_FOLLOWING, B), generator=generator)
    stock = "transformers" if bits == 16 else STOCK
    ours = [Steps("mixtura", accelerated, prompts_BL, following_NB)] if accelerated is not None else []
    here = [Steps(stock, contest.model, prompts_BL, following_NB), *ours]
    outputs = {one.who: one.logits() for one in here}
    left_out = dict(contest.left_out)
    there = contest.there("decode", outputs, left_out, prompts=prompts_BL, following=following_NB)
    everybody: list[Contestant] = [*here, *there, read]
    outcome = interleave(everybody, watch, rounds=rounds, burst=_BURST)
    bandwidth = read.bytes / 1e9 / outcome.timings["read"].seconds
    return Case(
        name,
        outcome,
        "tok/s",
        B,
        limits={"read": bandwidth},
        least=step_bytes(contest.model, B, L, bits) / 1e9 / bandwidth,
        errors=relative_errors(outputs, stock),
        cosines={} if bits == 16 else cosines(outputs, stock),
        left_out=left_out,
        beside=() if bits == 16 else (STOCK,),
    )


class Steps:
    """Decode steps of a model in this process; the cache is as it was after each burst.

    Args:
        who: name of the contestant.
        model: causal language model.
        prompts_BL: tokens before.
        following_NB: tokens of the steps.
    """

    def __init__(self, who: str, model: Any, prompts_BL: torch.Tensor, following_NB: torch.Tensor) -> None:
        self.who, self._model, self._following_NB = who, model, following_NB
        with torch.no_grad():
            self._cache = model(input_ids=prompts_BL, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def run(self, times: int, clock: str = "wall") -> list[float]:
        """Seconds of each of so many steps."""
        now, seconds = CLOCKS[clock], []
        for n in range(times):
            start = now()
            self._step(n)
            seconds.append(now() - start)
        self._cache.crop(-times)
        return seconds

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Of the first step, (B, V)."""
        made = self._step(0)
        self._cache.crop(-1)
        return made.float()

    def _step(self, n: int) -> torch.Tensor:
        ids_B1 = self._following_NB[n % len(self._following_NB), :, None]
        out = self._model(input_ids=ids_B1, past_key_values=self._cache, use_cache=True)
        logits_BV: torch.Tensor = out.logits[:, -1]
        return logits_BV
