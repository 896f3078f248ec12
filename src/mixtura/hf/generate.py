"""Text from a model, greedily and with its padding and end marked."""

from __future__ import annotations

from typing import Any

import torch

from mixtura.core.errors import OptionError


@torch.no_grad()
def generate_text(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 60) -> str:
    """What the model puts after the prompt; equal for equal arguments.

    Args:
        model: causal language model.
        tokenizer: of it.
        prompt: text to go on from; of at least one token.
        max_new_tokens: at most.

    Raises:
        OptionError: if the prompt has no token, or there is no tokenizer.
    """
    if tokenizer is None:
        raise OptionError("generation needs a tokenizer, but the model has none")
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = encoded["input_ids"].shape[1]
    if length == 0:
        raise OptionError(f"prompt must have at least one token, got {prompt!r}")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    made = model.generate(**encoded, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    return str(tokenizer.decode(made[0, length:], skip_special_tokens=True))
