"""Language models with random weights that the benchmarks generate with, in bfloat16.

B sequences, L positions, E experts, K slots a token.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import FetchError
from mixtura.core.files import cache_folder
from mixtura.hf.count import count_parameters

POSITIONS = 8192
_MOE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
_DENSE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
SHAPES = {"moe-1.3b": ("Qwen3Moe", _MOE), "dense-1.1b": ("Llama", _DENSE)}  # family and its configuration
UPCYCLED = "smollm2-upcycled"


def make_model(name: str, shapes: dict[str, tuple[str, dict[str, Any]]] = SHAPES) -> Any:
    """A model in bfloat16, in evaluation.

    Args:
        name: of ``shapes``, or ``UPCYCLED`` for SmolLM2 as the tour upcycles it.
        shapes: family and configuration by name.

    Raises:
        FetchError: if the model to upcycle is not in the cache.
    """
    import transformers

    if name == UPCYCLED:
        return _upcycled()
    family, settings = shapes[name]
    config = getattr(transformers, f"{family}Config")(
        **settings, max_position_embeddings=POSITIONS, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    with _default_dtype(torch.bfloat16):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.config.dtype = torch.bfloat16
    return model.eval().requires_grad_(False)


def _upcycled() -> Any:
    from mixtura.hf.load import load_model
    from mixtura.surgery.upcycle import upcycle
    from mixtura.tour import LAYERS, UPCYCLE

    if not (cache_folder() / "fetch" / "smollm2-135m").exists():
        raise FetchError("smollm2-135m is not in the cache: mixtura fetch smollm2-135m")
    base, _ = load_model("smollm2-135m")
    model = upcycle(base, layers=f"last:{LAYERS}", **UPCYCLE).model.bfloat16()
    return model.eval().requires_grad_(False)


def twin(model: Any) -> Any:
    """A model with the same parameters, not copies of them, and everything else its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def active_parameters(model: nn.Module) -> int:
    """Those that a token is multiplied with: the table of embeddings counts only where it is the output matrix too."""
    table: Any = model.get_input_embeddings().weight  # type: ignore[operator]
    output: Any = model.get_output_embeddings().weight  # type: ignore[operator]
    return count_parameters(model).active - (0 if table is output else table.numel())


def step_bytes(model: Any, B: int, L: int, bits: int = 16) -> float:
    """What a decode step has to read at least: weights of the experts that B tokens choose, other weights, the cache.

    Of E experts, B tokens that choose K at random are expected to touch E (1 - (1 - K/E)^B). With 8 or 4 bits every 32
    weights have a scale of 2 bytes, and all weights count as quantized; the cache is that of the model.
    """
    config = model.config
    size = next(model.parameters()).element_size()
    counts = count_parameters(model)
    idle = counts.total - counts.active
    E, K = getattr(config, "num_experts", None), getattr(config, "num_experts_per_tok", None)
    more = idle * (1 - (1 - K / E) ** B - K / E) / (1 - K / E) if idle and E and K else 0
    cached = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    weight = size if bits == 16 else bits / 8 + 2 / 32
    return weight * (active_parameters(model) + more) + size * B * L * cached
