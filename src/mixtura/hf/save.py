"""A model as a folder: weights, tokenizer, card, and the papers that say how it came about. Whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import mixtura
from mixtura.core.files import write_folder
from mixtura.hf.bars import no_bars

_NATIVE = "Load it with `AutoModelForCausalLM.from_pretrained(folder)`; it is a stock `{family}` and needs no mixtura."
_OWN = (
    "Load it with `import mixtura.hf` and then `AutoModelForCausalLM.from_pretrained(folder)`. Programs that never "
    "import mixtura need an export: `mixtura export FOLDER OUT`."
)
_FEW_BITS = (
    "Its weights have {bits} bits. Load it with `import mixtura.hf` and then "
    "`AutoModelForCausalLM.from_pretrained(folder)`; programs that never import mixtura cannot read the codes."
)


def save_model(
    model: Any,
    out: Path,
    *,
    tokenizer: Any = None,
    parents: tuple[str, ...] = (),
    receipts: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    numbers: Mapping[str, Any] | None = None,
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """Write the model with its card.

    Args:
        model: any model of transformers, ours included.
        out: new or empty folder.
        tokenizer: saved beside the model if given.
        parents: what the model was made from.
        receipts: by step, what a surgery preserved; also written as ``receipts.json``.
        recipe: of the training; also written as ``recipe.yaml``.
        numbers: results for the card, a table of two columns.
        command: what repeats it.
        overwrite: whether a folder that is there may be replaced, once the new one is whole.

    Raises:
        OptionError: if ``out`` exists and overwrite is False.
    """
    with no_bars(), write_folder(Path(out), overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if receipts:
            (folder / "receipts.json").write_text(json.dumps(receipts, indent=2) + "\n", encoding="utf-8")
        if recipe:
            (folder / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
        loading = _loading(model.config)
        card = _card(Path(out).resolve().name, loading, parents, receipts, recipe, numbers, command)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return Path(out)


def _loading(config: Any) -> str:
    """How to load it, the first line of the card."""
    quantization = getattr(config, "quantization_config", None)
    if getattr(quantization, "quant_method", None) == "mixtura":
        return _FEW_BITS.format(bits=quantization.bits)
    return _OWN if config.model_type == "mixtura" else _NATIVE.format(family=config.model_type)


def _card(
    name: str,
    loading: str,
    parents: tuple[str, ...],
    receipts: Mapping[str, Any] | None,
    recipe: Mapping[str, Any] | None,
    numbers: Mapping[str, Any] | None,
    command: str,
) -> str:
    front = {"library_name": "transformers", "tags": ["mixtura", "mixture-of-experts"], "base_model": list(parents)}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        loading,
        f"# {' '.join(name.split())}",
        f"Made with mixtura {mixtura.__version__}" + (f" from {', '.join(parents)}." if parents else "."),
    ]
    if command:
        parts.append(f"## Command\n\n```bash\n{command}\n```")
    if numbers:
        rows = "\n".join(f"| {key} | {value} |" for key, value in numbers.items())
        parts.append(f"## Numbers\n\n| what | value |\n|---|---|\n{rows}")
    if recipe:
        parts.append(f"## Recipe\n\n```yaml\n{yaml.safe_dump(dict(recipe), sort_keys=False)}```")
    if receipts:
        parts.append(f"## Receipts\n\n```json\n{json.dumps(receipts, indent=2)}\n```")
    return "\n\n".join(parts) + "\n"
