"""``quantize``: a model with 8 or 4 bits for the weights of experts and linear layers, and what that changed.

Bits are taken away module by module; routers, embeddings, norms, layers whose weight the model's own code reads and a
head that is tied to the embeddings keep theirs.
"""

from __future__ import annotations

from typing import Any

import torch

from mixtura.surgery.receipts import Before, Operated


def quantize(model: Any, *, bits: int = 8, tokens_BQ: torch.Tensor | None = None, **options: Any) -> Operated:
    """Quantize a model in memory.

    Args:
        model: causal language model of transformers or of the family, dense or with mixtures; it is changed in place.
        bits: 8 or 4.
        tokens_BQ: token ids that the logits are compared on; by default 2 x 64 drawn ones.
        **options: of ``MixturaQuantizationConfig``; ``linears`` is True here, so that dense models are quantized too.

    Returns:
        The model and its receipt: ``bytes`` of all parameters before and after, and what ``upcycle`` says but for
        numbers of parameters, which do not change.

    Raises:
        NotExpressibleError: if there is nothing to quantize, or the model is quantized already.
        OptionError: on a value that is not accepted; the model is as it was.
        UnknownNameError: for any other option.
    """
    from mixtura.hf.quantizer import MixturaQuantizationConfig, quantize_model

    asked = {"linears": True, **options, "bits": bits}
    chosen = MixturaQuantizationConfig(**asked).to_dict()
    before, size = Before(model, tokens_BQ), _bytes(model)
    quantize_model(model, **asked)
    said = {name: value for name, value in chosen.items() if name != "quant_method"}
    sizes = {"before": size, "after": _bytes(model)}
    compared = before.compare(model, "quantize", preserves=False)
    del compared["parameters"], compared["active_parameters"]
    return Operated(model, {"method": "quantize", "options": said, "bytes": sizes} | compared)


def _bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
