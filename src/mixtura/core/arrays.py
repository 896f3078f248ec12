"""The dozen array operations that the core needs, by the same name for numpy and torch.

The array-API standard has neither softmax nor a stable descending sort; this is all that is missing.
The type of the argument decides; nothing is converted and no library is imported that the caller has not imported.
"""

from __future__ import annotations

import sys
from typing import Any

from mixtura.core.errors import ShapeError

Array = Any  # numpy.ndarray or torch.Tensor; the core imports neither


def is_torch(x: Array) -> bool:
    """Whether ``x`` is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def require_2d(name: str, x: Array) -> None:
    """Raise ``ShapeError`` unless ``x`` has two dimensions."""
    if x.ndim != 2:
        raise ShapeError(f"{name} must have 2 dimensions, got shape {tuple(x.shape)}")


def float32(x: Array) -> Array:
    """``x`` in float32; float64 stays what it is."""
    if is_torch(x):
        return x if x.dtype.is_floating_point and x.element_size() == 8 else x.float()
    return x if x.dtype == "float64" else x.astype("float32")


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    if is_torch(x):
        return x.softmax(-1)
    import numpy as np

    with np.errstate(over="ignore"):  # what lies too far below the largest has a share of 0
        shifted = np.exp(x - x.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def sigmoid(x: Array) -> Array:
    """Logistic function."""
    if is_torch(x):
        return x.sigmoid()
    import numpy as np

    return np.exp(-np.logaddexp(0, -x))


def relu(x: Array) -> Array:
    """Positive part."""
    return x.relu() if is_torch(x) else x.clip(0)


def top_k(x: Array, k: int) -> Array:
    """Indices of the k largest along the last axis, largest first; ties go to the lowest index."""
    if is_torch(x):
        return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    import numpy as np

    return np.argsort(-x, axis=-1, kind="stable")[..., :k]


def take(x: Array, index: Array) -> Array:
    """``x`` gathered along the last axis."""
    if is_torch(x):
        return x.gather(-1, index)
    import numpy as np

    return np.take_along_axis(x, index, axis=-1)


def where(mask: Array, x: Array, value: float) -> Array:
    """``x`` where ``mask``, else ``value``; of the type of ``x``."""
    if is_torch(x):
        return x.masked_fill(~mask, value)
    import numpy as np

    return np.where(mask, x, np.asarray(value, dtype=x.dtype))


def scatter_rows(index_TK: Array, value_TK: Array, width: int) -> Array:
    """Dense (T, width) with ``value`` added at ``index`` row by row."""
    if is_torch(value_TK):
        zeros = value_TK.new_zeros(len(value_TK), width)
        return zeros.scatter_add(1, index_TK, value_TK)
    import numpy as np

    dense = np.zeros((len(value_TK), width), dtype=value_TK.dtype)
    np.add.at(dense, (np.arange(len(value_TK))[:, None], index_TK), value_TK)
    return dense


def repeat_last(x: Array, times: int) -> Array:
    """Each entry of the last axis ``times`` times in a row."""
    return x.repeat_interleave(times, -1) if is_torch(x) else x.repeat(times, -1)


def count(index: Array, width: int) -> Array:
    """How often each of 0 .. width - 1 occurs, as integers."""
    if is_torch(index):
        return index.reshape(-1).bincount(minlength=width)
    import numpy as np

    return np.bincount(index.reshape(-1), minlength=width)


def xlogx(p: Array) -> Array:
    """p log p, 0 at p = 0, in nats."""
    if is_torch(p):
        import torch

        return torch.special.xlogy(p, p)
    import numpy as np

    return p * np.log(np.where(p > 0, p, 1))
