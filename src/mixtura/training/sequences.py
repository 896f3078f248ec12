"""What a run reads: blocks of tokens from its domains, in a fixed order, as many as its steps need."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch.utils.data import Dataset

from mixtura.core.errors import OptionError
from mixtura.training.recipe import Recipe


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """Blocks as Trainer wants them: every token is also a label.

    Args:
        blocks: by index, with "input_ids" (L,).
    """

    def __init__(self, blocks: Any) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids_L = torch.as_tensor(self.blocks[index]["input_ids"])
        return {"input_ids": ids_L, "labels": ids_L}

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Any, corpus: Any = None) -> Self:
        """The blocks of a recipe.

        Args:
            recipe: its domains, proportions, length, steps and seed decide.
            tokenizer: of the model.
            corpus: ``mixtura.data.Corpus`` with the recipe's domains; None loads it.

        Raises:
            OptionError: if there is no tokenizer, or a domain has no document of one block.
            UnknownNameError, FetchError: if a domain is not there.
        """
        from mixtura.data import Corpus, MixedBlocks

        if tokenizer is None:
            raise OptionError(f"tokenizer is needed to read {sorted(recipe.data.domains)}, got None")
        if corpus is None:
            corpus = Corpus.load(recipe.data.domains, on_missing="raise")
        blocks = MixedBlocks(
            corpus.train,
            {name.partition("=")[0]: share for name, share in recipe.data.domains.items()},
            total=recipe.training_tokens // recipe.data.sequence_length,
            length=recipe.data.sequence_length,
            tokenize=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
            seed=recipe.seed,
        )
        return cls(blocks)
