"""``load_model``: model and tokenizer by a known name, a folder, or an id on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mixtura.core.errors import FetchError, FileFormatError, MixturaError, MixturaWarning, unknown_name
from mixtura.data.fetch import fetch
from mixtura.hf.bars import no_bars

KNOWN = ("smollm2-135m",)


def load_model(name_or_path: str | Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load for inference or training, every tensor of it.

    Args:
        name_or_path: one of ``KNOWN``, a folder with a config.json, a .gguf file of a Llama, or an id ``owner/name`` on
            the Hub. Only safetensors and GGUF are read, and no code from the Hub is run.
        dtype: of the weights.

    Returns:
        The model in eval mode, and its tokenizer; None if a folder has none.

    Raises:
        UnknownNameError: with the nearest known name.
        FileFormatError: if the folder is no model, a file in it is damaged, or tensors are missing or of another shape.
        FetchError: if a known model or a Hub id cannot be had.
        NotExpressibleError: if the transformers that is installed computes the family wrongly.
    """
    from mixtura.hf.gguf import load_gguf
    from mixtura.hf.wrong_forward import check_forward

    name, path = str(name_or_path), Path(name_or_path)
    if name in KNOWN:
        return load_gguf(next(fetch(name).rglob("*.gguf")), dtype=dtype)
    if path.suffix == ".gguf" and path.is_file():
        return load_gguf(path, dtype=dtype)
    if path.exists():
        check_forward(_model_type(path))
    elif name.count("/") != 1:
        raise unknown_name("model", name, KNOWN)
    return _from_transformers(name, dtype)


def _model_type(path: Path) -> str:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or "model_type" not in config:
        raise FileFormatError(f"{str(path)!r} is no model: it has no readable config.json with a model_type")
    return str(config["model_type"])


def _from_transformers(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    import mixtura.hf  # noqa: F401  registers the family and the backends

    bars = no_bars() if Path(name).exists() else contextlib.nullcontext()
    with _one_line_of_error(name), bars:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused by name below
            output_loading_info=True,
        )
    _check_tensors(name, info)
    return model.eval(), _tokenizer(name)


def _check_tensors(name: str, info: dict[str, Any]) -> None:
    """Refuse tensors that are missing or of another shape, warn of those that the model has no place for."""
    wrong = {"lacks tensors": info["missing_keys"], "has other shapes": [key for key, *_ in info["mismatched_keys"]]}
    for what, keys in wrong.items():
        if keys:
            raise FileFormatError(f"model {name!r} {what}: {_names(keys)}")
    if info["unexpected_keys"]:
        unused = _names(info["unexpected_keys"])
        warnings.warn(f"model {name!r} has tensors that its class does not use: {unused}", MixturaWarning, 3)


def _names(keys: Iterable[str]) -> str:
    names = sorted(map(str, keys))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    path = Path(name)
    if path.exists() and not [*path.glob("tokenizer*"), *path.glob("vocab.*")]:
        return None
    with _one_line_of_error(name, "its tokenizer "):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


@contextlib.contextmanager
def _one_line_of_error(name: str, part: str = "") -> Iterator[None]:
    """Anything that a damaged, foreign or absent model makes transformers raise, as an error of ours."""
    try:
        yield
    except MixturaError:
        raise
    except Exception as error:  # tokenizers and safetensors raise Exception itself
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).strip().partition("\n")[0]
        kind = FetchError if isinstance(error, OSError) and not Path(name).exists() else FileFormatError
        raise kind(f"model {name!r}: {part}cannot be loaded: {reason}") from error
