"""Steps of training: forward, backward and AdamW, against the same model by transformers and its dense twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from mixtura.bench.limits import DTYPES, Product
from mixtura.bench.measuring import Contestant, Here, Watch, interleave
from mixtura.bench.models import active_parameters
from mixtura.bench.report import Case
from mixtura.nn.backends import automatic_backend

_SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
_EXPERTS = {"moe_intermediate_size": 512, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
BATCH = (8, 256)
TWIN = "transformers, dense twin"


def train(
    watch: Watch,
    *,
    wanted: Callable[[str], bool],
    rounds: int,
    shape: dict[str, Any] = _SHAPE,
    experts: dict[str, Any] = _EXPERTS,
    batch: tuple[int, int] = BATCH,
) -> Iterator[Case]:
    """Time steps of a Qwen3-MoE of 29 million parameters; a value is tokens a second.

    Weights are float32; in the case bf16 forward runs under autocast, in bf16-weights everything is bfloat16. The dense
    twin has the size of what is active; it is no peer.

    Args:
        watch: over the machine.
        wanted: whether a case of that name is.
        rounds: as in ``interleave``.
        shape: of the model.
        experts: what makes it a mixture.
        batch: sequences and their length.
    """
    ids = torch.randint(0, shape["vocab_size"], batch, generator=torch.Generator().manual_seed(0))
    for name, (dtype, autocast) in {
        "small/fp32": (torch.float32, False),
        "small/bf16": (torch.float32, True),
        "small/bf16-weights": (torch.bfloat16, False),
    }.items():
        if wanted(name):
            watch.release()
            steps = {who: Step(model, ids, autocast) for who, model in _models(shape, experts, dtype).items()}
            losses = {who: step() for who, step in steps.items() if who != TWIN}
            product = Product(DTYPES["bf16" if "bf16" in name else "fp32"])
            everybody: list[Contestant] = [*(Here(who, step) for who, step in steps.items()), Here("gemm", product)]
            outcome = interleave(everybody, watch, rounds=rounds)
            gemm = product.operations / 1e9 / outcome.timings["gemm"].seconds
            reference = losses["transformers eager"]
            yield Case(
                name,
                outcome,
                "tok/s",
                ids.numel(),
                limits={"gemm": gemm},
                least=6e-9 * active_parameters(steps["mixtura"].model) * ids.numel() / gemm,
                errors={who: abs(loss - reference) / reference for who, loss in losses.items()},
                beside=(TWIN,),
            )


class Step:
    """A step of training on the same tokens again and again."""

    def __init__(self, model: Any, ids: torch.Tensor, autocast: bool) -> None:
        self.model, self._ids, self._autocast = model, ids, autocast
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> float:
        """Its loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            loss = self.model(input_ids=self._ids, labels=self._ids).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def _models(shape: dict[str, Any], experts: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register("mixtura_automatic", automatic_backend)
    active = experts["num_experts_per_tok"] * experts["moe_intermediate_size"]
    made: dict[str, Any] = {}
    for who, name in (("mixtura", "mixtura_automatic"), *((f"transformers {n}", n) for n in ("eager", "grouped_mm"))):
        torch.manual_seed(0)
        made[who] = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **experts, intermediate_size=active)).to(dtype)
        made[who].set_experts_implementation(name)
    torch.manual_seed(0)
    made[TWIN] = Qwen3ForCausalLM(Qwen3Config(**shape, intermediate_size=active)).to(dtype)
    return made
