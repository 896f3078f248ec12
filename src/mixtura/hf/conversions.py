"""How the family lies on disk: one tensor an expert, and names of ours that the renamings of no base touch.

transformers renames by parts of names, all renamings of a family one after the other. Parts of ours that bases rename
(``gate.weight``, ``gate.bias``) have another name while those are at work.
"""

from __future__ import annotations

from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

MAX_FORMS = 8  # feed-forward forms of one ExpertGroup that have names on disk


_PLACES = ("mixture", "gate", "router")  # what a router of ours stands in


def around(base: list[WeightTransform]) -> list[WeightTransform]:
    """The conversions of a base, and those of ours."""
    hide = [WeightRenaming(f"{place}.router.gate.", f"{place}.router.ours.") for place in _PLACES]
    show = [WeightRenaming(f"{place}.router.ours.", f"{place}.router.gate.") for place in _PLACES]
    return [*hide, *_conversions(), *base, *show]


def _conversions() -> list[WeightConverter]:
    """From one tensor an expert on disk to stacks in memory, and back."""
    # the more special places first: a "*" stands for anything, and the first pattern that fits is taken
    places = [*(f"mixture.experts.forms.{i}" for i in range(MAX_FORMS)), "mixture.experts"]
    return [converter for place in places for converter in _conversions_at(place)]


def _conversions_at(place: str) -> list[WeightConverter]:
    converters = []
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        halves = [f"{place}.*.gate_proj.{kind}", f"{place}.*.up_proj.{kind}"]
        converters += [
            WeightConverter(halves, f"{place}.gate_up_proj{suffix}", [MergeModulelist(0), Concatenate(1)]),
            WeightConverter(f"{place}.*.fc1.{kind}", f"{place}.up_proj{suffix}", [MergeModulelist(0)]),
            WeightConverter(f"{place}.*.down_proj.{kind}", f"{place}.down_proj{suffix}", [MergeModulelist(0)]),
        ]
    return converters
