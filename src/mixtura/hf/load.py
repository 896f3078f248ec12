"""``load_model``: model and tokenizer by a known name, a folder, or an id on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mixtura.core.errors import FetchError, FileFormatError, unknown_name
from mixtura.data.fetch import fetch

KNOWN = ("smollm2-135m",)


def load_model(name_or_path: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load for inference or training, every tensor of it.

    Args:
        name_or_path: one of ``KNOWN``, a folder with a config.json, a .gguf file, or an id ``owner/name`` on the Hub.
        dtype: of the weights.

    Returns:
        The model in eval mode, and its tokenizer; None if a folder has none.

    Raises:
        UnknownNameError: with the nearest known name.
        FileFormatError: if the folder is no model, or a file in it is damaged or lacks tensors.
        FetchError: if a known model or a Hub id cannot be had.
    """
    from mixtura.hf.gguf import load_gguf

    name, path = str(name_or_path), Path(name_or_path)
    if name in KNOWN:
        return load_gguf(next(fetch(name).rglob("*.gguf")), dtype=dtype)
    if path.suffix == ".gguf" and path.is_file():
        return load_gguf(path, dtype=dtype)
    if path.exists():
        _check_folder(path)
    elif name.count("/") != 1:
        raise unknown_name("model", name, KNOWN)
    return _from_transformers(name, dtype)


def _check_folder(path: Path) -> None:
    config = path / "config.json"
    try:
        readable = "model_type" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        readable = False
    if not readable:
        raise FileFormatError(f"{str(path)!r} is no model: it has no readable config.json with a model_type")


def _from_transformers(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    import mixtura.hf  # noqa: F401  registers the family and the backends

    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise FileFormatError(f"model {name!r} is damaged: {error}") from None
    except (OSError, ValueError) as error:
        kind = FileFormatError if Path(name).exists() else FetchError
        raise kind(f"model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    missing = sorted(str(key) for key in info["missing_keys"])
    if missing:
        raise FileFormatError(f"model {name!r} lacks {len(missing)} tensors, first {missing[0]}")
    return model.eval(), _tokenizer(name)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    if Path(name).exists() and not list(Path(name).glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(name)
