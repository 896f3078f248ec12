"""Where a run starts: the recipe's model, upcycled as it says."""

from __future__ import annotations

from typing import Any

from mixtura.training.recipe import Recipe


def starting_point(recipe: Recipe) -> tuple[Any, Any, dict[str, Any]]:
    """Load the model and upcycle it; equal for equal recipes.

    Returns:
        Model, tokenizer, and the receipts by step.

    Raises:
        OptionError: if ``recipe.upcycle`` has an option that its method has not.
    """
    import transformers

    from mixtura.hf.load import load_model

    transformers.set_seed(recipe.seed)
    model, tokenizer = load_model(recipe.model)
    if recipe.upcycle is None:
        return model, tokenizer, {}
    from mixtura.surgery.upcycle import upcycle

    result = upcycle(model, **recipe.upcycle)
    return result.model, tokenizer, {"upcycle": result.receipt}
