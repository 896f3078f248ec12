"""Which decoder layers are meant: "all", "first:2", "last:6", "every:2", "24-29", or numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mixtura.core.errors import OptionError


def chosen_layers(layers: str | Sequence[int], number: int) -> list[int]:
    """Numbers of the layers, rising.

    Args:
        layers: as the head of the file says; "every:2" takes the last of each two.
        number: how many layers there are.

    Raises:
        OptionError: if nothing is chosen, a layer does not exist, or the text is of none of these forms.
    """
    listed = _parse(layers, number) if isinstance(layers, str) else layers
    if not isinstance(listed, Sequence) or not all(type(layer) is int for layer in listed):
        raise OptionError(f"layers must be a text or a list of whole numbers, got {layers!r}")
    chosen = sorted(set(listed))
    if not chosen or chosen[0] < 0 or chosen[-1] >= number:
        raise OptionError(f"layers must name some of 0 .. {number - 1}, got {layers!r}")
    return chosen


def _parse(text: str, number: int) -> list[int]:
    if text == "all":
        return list(range(number))
    if match := re.fullmatch(r"(first|last|every):(\d+)", text):
        n = int(match[2])
        if not 1 <= n <= number:
            raise OptionError(f"layers {text!r} must count 1 .. {number}")
        everything = range(number)
        return list({"first": everything[:n], "last": everything[-n:], "every": everything[n - 1 :: n]}[match[1]])
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        return list(range(int(match[1]), int(match[2]) + 1))
    if re.fullmatch(r"\d+(,\d+)*", text):
        return [int(part) for part in text.split(",")]
    raise OptionError(f"layers must be 'all', 'first:N', 'last:N', 'every:N', 'A-B' or numbers, got {text!r}")
