"""Provisional."""

from __future__ import annotations

from typing import Any

import torch

from mixtura.training.recipe import Recipe


class Sequences(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What a run reads, in its order."""

    def __init__(self, blocks: list[list[int]]) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor(self.blocks[index])
        return {"input_ids": ids, "labels": ids}

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Any, corpus: Any) -> Sequences:
        """Provisional."""
        L = recipe.data.sequence_length
        need = recipe.training_tokens // L
        ids = tokenizer("".join(t for d in corpus.train.values() for t in d))["input_ids"]
        blocks = [ids[i * L : (i + 1) * L] for i in range(len(ids) // L)]
        return cls((blocks * (need // len(blocks) + 1))[:need])
