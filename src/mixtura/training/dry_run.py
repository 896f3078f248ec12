"""``dry_run``: what a recipe would train and cost, without training. The model is built without weights.

Estimates, in the notation of their formulas (P parameters of products, L tokens of a sequence, V vocabulary, B tokens
of a forward pass):

    forward FLOPs a token    2 P_active + 2 (heads x width of a head) L for each layer; causal, so half of L on average
    training FLOPs a token   forward, plus 2 P_active of what is trained (its gradient), plus forward again from the
                             lowest trained layer up (the gradient of activations); layers are taken as equal
    memory                   weights + gradients + AdamW's two moments + what the layers from the lowest trained one
                             up keep for backward + three times the logits (B V)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mixtura.core.errors import OptionError
from mixtura.training.recipe import Recipe

_FLOAT = 4  # bytes
_HIDDEN_KEPT = 12  # tensors (B, D) that a layer keeps for backward, beside those of its feed-forward
_INNER_KEPT = 1.5  # numbers a token that a feed-forward keeps for backward, in parameters / D (gated: 4 F of 3 F D)


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """Count what the recipe would build.

    Args:
        recipe: of a known model, a folder or a Hub id; of the latter two only the configuration is read.

    Returns:
        Plain JSON: "parameters", "active_parameters", "trainable_parameters", "forward_flops_per_token",
        "training_flops_per_token", "training_flops", "memory_bytes" (by part, and "total"), "tokens".

    Raises:
        OptionError: if the recipe does not fit the model.
        NotExpressibleError: if a layer to upcycle is no dense feed-forward.
    """
    from mixtura.hf.count import count_parameters
    from mixtura.training.blank import blank_model
    from mixtura.training.parameters import freeze_all_but

    model = blank_model(recipe)
    trained = freeze_all_but(model, recipe.train)
    if not trained:
        raise OptionError(f"nothing is left to train: train.parameters is {recipe.train.parameters!r}")
    counts = count_parameters(model)
    forward, training = _flops(model, recipe)
    return {
        "parameters": counts.total,
        "active_parameters": counts.active,
        "trainable_parameters": counts.trainable,
        "forward_flops_per_token": forward,
        "training_flops_per_token": training,
        "training_flops": training * recipe.training_tokens,
        "memory_bytes": _memory(model, recipe),
        "tokens": recipe.training_tokens,
    }


def format_dry_run(numbers: dict[str, Any]) -> str:
    """The numbers of ``dry_run`` as lines for people."""
    memory = numbers["memory_bytes"]
    parts = ", ".join(f"{name} {memory[name] / 1e9:.2f}" for name in memory if name != "total")
    return "\n".join(
        [
            f"parameters          {numbers['parameters'] / 1e6:,.1f} M",
            f"active a token      {numbers['active_parameters'] / 1e6:,.1f} M",
            f"trained             {numbers['trainable_parameters'] / 1e6:,.1f} M",
            f"tokens              {numbers['tokens']:,}",
            f"FLOPs a token       {numbers['forward_flops_per_token'] / 1e6:,.0f} M forward, "
            f"{numbers['training_flops_per_token'] / 1e6:,.0f} M in training",
            f"FLOPs in all        {numbers['training_flops']:.2e}",
            f"memory, estimated   {memory['total'] / 1e9:.2f} GB ({parts})",
        ]
    )


def _flops(model: Any, recipe: Recipe) -> tuple[int, int]:
    """Forward and training FLOPs of a token."""
    head = 2 * model.get_output_embeddings().weight.numel()
    layers = 2 * _active_in_layers(model)
    layers += 2 * _attention_width(model.config) * recipe.data.sequence_length * model.config.num_hidden_layers
    forward = layers + head
    return forward, forward + 2 * _active_trained(model) + round(layers * _share_above(model)) + head


def _memory(model: Any, recipe: Recipe) -> dict[str, int]:
    config, tokens = model.config, recipe.train.batch_size * recipe.data.sequence_length
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = _HIDDEN_KEPT * config.hidden_size * config.num_hidden_layers
    kept += _INNER_KEPT * _active_in_layers(model) / config.hidden_size
    parts = {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients": _FLOAT * trained,
        "optimizer": 2 * _FLOAT * trained,
        "activations": round(_FLOAT * tokens * kept * _share_above(model)),
        "logits": 3 * _FLOAT * tokens * config.vocab_size,
    }
    return {**parts, "total": sum(parts.values())}


def _active_in_layers(model: Any) -> int:
    """Parameters that a token passes outside of the head and the tables of embeddings."""
    from mixtura.hf.count import count_parameters

    outside = {id(model.get_output_embeddings().weight): model.get_output_embeddings().weight}
    outside |= {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return count_parameters(model).active - sum(weight.numel() for weight in outside.values())


def _active_trained(model: Any) -> int:
    """Trained parameters that a token passes; idle experts get no gradient from it."""
    from mixtura.hf import mixtures
    from mixtura.hf.count import count_parameters

    counts = count_parameters(model)
    experts = [p for mixture in mixtures(model).values() for p in mixture.experts.parameters()]
    sparse = all(p.requires_grad for p in experts)
    return counts.trainable - (counts.total - counts.active if sparse else 0)


def _share_above(model: Any) -> float:
    """Share of layers that backward passes: from the lowest trained one up; all if something outside is trained."""
    from mixtura.hf.sites import decoder_layers

    trains = [any(p.requires_grad for p in layer.parameters()) for layer in decoder_layers(model)]
    inside = sum(p.requires_grad for layer in decoder_layers(model) for p in layer.parameters())
    outside = sum(p.requires_grad for p in model.parameters()) - inside
    return 1.0 if outside else 1 - trains.index(True) / len(trains)


def _attention_width(config: Any) -> int:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width * config.num_attention_heads)
