"""What lies in a model's folder, compared with the model tensor by tensor.

Names and shapes are those that transformers would write today for the way in which the model was loaded (one tensor an
expert on disk, one stack in memory), so nothing has to be loaded to see what is missing: a model on the meta device is
compared by shapes alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from transformers.core_model_loading import revert_weight_conversion

from mixtura.core.errors import FileFormatError

_LAYER = re.compile(r"(.*?\.\d+\.)?.*")


class Stored(NamedTuple):
    """Differences between files and model.

    Attributes:
        tensors: how many lie in the files.
        missing: names that the model needs and no file has; such tensors are drawn anew when a model is loaded.
        unexpected: names that the model has no place for.
        mismatched: by name, the shape in the file and in the model.
        differing: names whose values are others in the model, after conversion to its type.
    """

    tensors: int
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[list[int], list[int]]]
    differing: list[str]


def compare_with_files(model: Any, folder: str | Path) -> Stored:
    """Compare a model with the safetensors of a folder; one tensor at a time is read.

    Args:
        model: of transformers or of the family; under PEFT the base model is compared.
        folder: that it was saved to or loaded from.

    Raises:
        FileFormatError: if the folder has no safetensors, or they are damaged.
    """
    base, adapters = (model.get_base_model(), set(model.peft_config)) if hasattr(model, "peft_config") else (model, ())
    files = _files(Path(folder))
    found: dict[str, tuple[list[int], list[int]]] = {}
    seen, differing = set(), []
    for name, tensor in _expected(base, set(adapters)):
        seen.add(name)
        if name not in files:
            continue
        shape = _shape(files[name], name)
        if shape != list(tensor.shape):
            found[name] = (shape, list(tensor.shape))
        elif tensor.device.type != "meta" and not _equal(_read(files[name], name), tensor):
            differing.append(name)
    missing = _without(seen - files.keys() - _tied(base, files), base, "_keys_to_ignore_on_load_missing")
    unexpected = _without(files.keys() - seen, base, "_keys_to_ignore_on_load_unexpected")
    return Stored(len(files), missing, unexpected, found, sorted(differing))


def _expected(model: Any, adapters: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as they would be written, layer by layer: a stack that is taken apart can be a copy."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if adapters.isdisjoint(name.split(".")):
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            groups.setdefault(_LAYER.fullmatch(name)[1] or "", {})[name] = tensor  # type: ignore[index]
    for group in groups.values():
        yield from revert_weight_conversion(model, group).items()


def _files(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [folder / Path(name).name for name in names]
        else:
            paths = [single]
        files = {}
        for path in paths:
            with safetensors.safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        return files
    except (OSError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        raise FileFormatError(f"weights in {str(folder)!r} cannot be read: {error}") from None


def _shape(path: Path, name: str) -> list[int]:
    with safetensors.safe_open(path, framework="pt") as file:
        return list(file.get_slice(name).get_shape())


def _read(path: Path, name: str) -> torch.Tensor:
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _equal(stored: torch.Tensor, tensor: torch.Tensor) -> bool:
    stored = stored.to(tensor)
    return bool(((stored == tensor) | (stored.isnan() & tensor.isnan())).all())


def _tied(model: Any, present: dict[str, Path]) -> set[str]:
    """Names whose tensor is in a file under another name."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {name for group in names.values() if group & present.keys() for name in group}


def _without(names: set[str], model: Any, attribute: str) -> list[str]:
    """Without those that the family declares to be of no concern."""
    patterns = getattr(model, attribute, None) or ()
    return sorted(name for name in names if not any(re.search(pattern, name) for pattern in patterns))
