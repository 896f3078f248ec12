"""Prompts of language models: tokens a second until the logits of the last one.

L tokens of one prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mixtura.bench.contest import Contest, relative_errors
from mixtura.bench.limits import Product
from mixtura.bench.measuring import Contestant, Here, Watch, interleave
from mixtura.bench.models import SHAPES, active_parameters, make_model, twin
from mixtura.bench.report import Case

CASES = (("moe-1.3b", 512), ("moe-1.3b", 4096))


def prefill(
    watch: Watch,
    peers: Mapping[str, Path],
    versions: dict[str, str],
    *,
    wanted: Callable[[str], bool],
    rounds: int,
    cases: tuple[tuple[str, int], ...] = CASES,
    shapes: dict[str, tuple[str, dict[str, Any]]] = SHAPES,
) -> Iterator[Case]:
    """Time prompts.

    Args:
        watch: over the machine.
        peers: interpreters by name; llama.cpp, and transformers with vLLM's sgl experts take part.
        versions: those of the peers are added.
        wanted: whether a case of that name is.
        rounds: as in ``interleave``.
        cases: model, L.
        shapes: of the models.
    """
    for model_name in dict.fromkeys(name for name, _ in cases):
        names = {f"{name}/bf16/L{L}": L for name, L in cases if name == model_name}
        names = {name: L for name, L in names.items() if wanted(name)}
        if names:
            with contextlib.ExitStack() as stack:
                contest = Contest(make_model(model_name, shapes), stack, watch)
                contest.invite_llama(peers, versions)
                contest.invite_sgl(peers, versions)
                accelerated = contest.accelerated(twin(contest.model))
                for name, L in names.items():
                    yield _case(contest, accelerated, name, L, watch, rounds)


def _case(contest: Contest, accelerated: Any, name: str, L: int, watch: Watch, rounds: int) -> Case:
    watch.release()
    model = contest.model
    prompts_1L = torch.randint(0, model.config.vocab_size, (1, L), generator=torch.Generator().manual_seed(L))
    models = {"transformers": model} | ({"mixtura": accelerated} if accelerated is not None else {})
    calls = {who: Prompt(one, prompts_1L) for who, one in models.items()}
    outputs = {who: call() for who, call in calls.items()}
    left_out = dict(contest.left_out)
    there = contest.there("prefill", outputs, left_out, prompts=prompts_1L)
    product = Product(torch.bfloat16)
    here = [Here(who, call) for who, call in calls.items()]
    everybody: list[Contestant] = [*here, *there, Here("gemm", product)]
    outcome = interleave(everybody, watch, rounds=rounds)
    gemm = product.operations / 1e9 / outcome.timings["gemm"].seconds
    return Case(
        name,
        outcome,
        "tok/s",
        L,
        limits={"gemm": gemm},
        least=_operations(model, L) / 1e9 / gemm,
        errors=relative_errors(outputs, "transformers"),
        left_out=left_out,
    )


class Prompt:
    """Reads a prompt into a new cache."""

    def __init__(self, model: Any, prompts_1L: torch.Tensor) -> None:
        self._model, self._prompts_1L = model, prompts_1L

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        """Logits of the last token, (1, V)."""
        logits_1V: torch.Tensor = self._model(input_ids=self._prompts_1L, use_cache=True, logits_to_keep=1).logits
        return logits_1V[:, -1].float()


def _operations(model: Any, L: int) -> float:
    """Of products with weights (the output matrix for one token) and of causal attention."""
    config = model.config
    output = model.get_output_embeddings().weight.numel()
    attention = 2 * L * L * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2 * ((active_parameters(model) - output) * L + output) + attention
