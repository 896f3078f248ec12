"""Whether checkpoints belong to a run: the same recipe, the same frozen weights, the same text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from mixtura.core.errors import FileFormatError, OptionError
from mixtura.core.files import write_file
from mixtura.training.recipe import Recipe

NOTE = "run.json"
VERSION = 1
_SHOWN = 16  # sequences that stand for the text


def check_same_run(folder: Path, recipe: Recipe, model: nn.Module, sequences: Any) -> None:
    """Note in the folder which run its checkpoints are of, or compare with the note.

    Raises:
        OptionError: naming the first thing that differs.
        FileFormatError: if the note cannot be read, or a newer version has written it.
    """
    own = json.loads(json.dumps(_identity(recipe, model, sequences)))
    path = folder / NOTE
    if not path.exists():
        with write_file(path) as partial:
            partial.write_text(json.dumps(own, indent=2), encoding="utf-8")
        return
    noted = _noted(path)
    for name in {**own, **noted}:
        if own.get(name) != noted.get(name):
            raise OptionError(
                f"the checkpoints in {str(folder)!r} are of another run: {name} was {noted.get(name)!r}, is "
                f"{own.get(name)!r}; pass resume=False to start over"
            )


def _noted(path: Path) -> dict[str, Any]:
    try:
        noted = {"format": VERSION, **json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise FileFormatError(f"{str(path)!r} does not say which run its checkpoints are of: {error}") from None
    if not isinstance(noted["format"], int) or noted["format"] > VERSION:
        raise FileFormatError(
            f"the checkpoints in {str(path.parent)!r} have version {noted['format']!r}, known are up to {VERSION}; "
            "upgrade mixtura"
        )
    return noted


def _identity(recipe: Recipe, model: nn.Module, sequences: Any) -> dict[str, Any]:
    frozen = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen.update(name.encode())
            frozen.update(_bytes(parameter))
    text = hashlib.sha256()
    for i in range(min(_SHOWN, len(sequences))):
        text.update(_bytes(sequences[i]["input_ids"]))
    return {
        "format": VERSION,
        **_flat(recipe.to_dict()),
        "frozen weights": frozen.hexdigest(),
        "text": text.hexdigest(),
    }


def _bytes(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
