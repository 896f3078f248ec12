"""The recipe of a training run: what is read, trained, and how; checked before anything runs. YAML, or a dictionary.

    model: smollm2-135m
    upcycle: {method: sparse-upcycling, layers: "last:6", copies: 4, shards: 2, k: 2}
    data: {domains: {code-python: 0.5, man-de: 0.5}, sequence_length: 256}
    train: {steps: 40, batch_size: 4, learning_rate: 4e-4}
    balance: {load-balancing: 0.01}

Every field that is unknown, of another type or out of range is named by its path, as ``train.steps``.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml

from mixtura.core import registry
from mixtura.core.errors import FileFormatError, OptionError, UnknownNameError, unknown_name
from mixtura.core.roles import parse

VERSION = 1
_LAYERS = re.compile(r"feed-forward:(\d+)(?:-(\d+))?")


def _positive(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"above": 0})


def _from_zero(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"minimum": 0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Section:
    """A part of the recipe; its fields' annotations and metadata are its schema."""

    PATH: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            path = self.PATH + field.name
            value = _typed(path, getattr(self, field.name), hints[field.name])
            _check_range(path, value, field.metadata)
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values, as YAML or JSON give them.

        Raises:
            OptionError: naming the path of what is unknown, missing, of another type or out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in values:
            if name not in fields:
                known = [cls.PATH + field for field in fields]
                raise OptionError(str(unknown_name("field", cls.PATH + name, known)))
        for name, field in fields.items():
            if name not in values and field.default is field.default_factory is dataclasses.MISSING:
                raise OptionError(f"{cls.PATH}{name} is missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which ``from_dict`` builds an equal one."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataRecipe(_Section):
    """What is read.

    Attributes:
        domains: share of the training tokens by domain; a list of names stands for equal shares.
        sequence_length: tokens of a training sequence.
        held_out_tokens: tokens of each domain that bits per byte are measured on.
    """

    PATH: ClassVar[str] = "data."

    domains: dict[str, float]
    sequence_length: int = _positive(256)
    held_out_tokens: int = _positive(8192)

    def __post_init__(self) -> None:
        if isinstance(self.domains, list | tuple):
            object.__setattr__(self, "domains", dict.fromkeys(self.domains, 1.0))
        super().__post_init__()
        if not self.domains:
            raise OptionError("data.domains must name at least one domain, got none")
        for name, share in self.domains.items():
            _check_range(f"data.domains.{name}", share, {"above": 0})
        if self.sequence_length < 2:
            raise OptionError(f"data.sequence_length must be at least 2, got {self.sequence_length}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRecipe(_Section):
    """How it is trained.

    Attributes:
        steps: updates of the parameters.
        batch_size: sequences of a forward pass.
        gradient_accumulation: forward passes of a step.
        learning_rate: of AdamW, at its peak.
        router_learning_rate: of the routers alone; None is ``learning_rate``, 0 freezes them.
        schedule: "cosine" falls to 0 at the last step, "constant" stays.
        warmup: steps in which the rate rises linearly from 0.
        weight_decay: of matrices; never of vectors and routers.
        max_grad_norm: the gradient is scaled down to this norm; 0 leaves it.
        precision: of the products; "bfloat16" is autocast, and parameters and updates stay float32 in either.
        parameters: "mixtures" (experts, routers, shared experts), "all", "feed-forward:24-29" (what stands in the place
            of the feed-forward in these layers), or expressions of ``mixtura.core.roles`` by comma, as
            "layers[24:30].experts[4:8], routers".
        save_every: steps between checkpoints; 0 writes none.
        log_every: steps between two rows of the history.
    """

    PATH: ClassVar[str] = "train."

    steps: int = _positive()
    batch_size: int = _positive(4)
    gradient_accumulation: int = _positive(1)
    learning_rate: float = _positive(4e-4)
    router_learning_rate: float | None = _from_zero(None)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = _from_zero(0)
    weight_decay: float = _from_zero(0.0)
    max_grad_norm: float = _from_zero(1.0)
    precision: Literal["float32", "bfloat16"] = "float32"
    parameters: str = "mixtures"
    save_every: int = _from_zero(100)
    log_every: int = _positive(1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup >= self.steps:
            raise OptionError(f"train.warmup must be below train.steps = {self.steps}, got {self.warmup}")
        try:
            for expression in [] if self.feed_forward_layers else self.roles:
                parse(expression)
        except (OptionError, UnknownNameError) as error:
            raise OptionError(
                f"train.parameters must be 'mixtures', 'all', 'feed-forward:FIRST-LAST' or roles, got "
                f"{self.parameters!r}: {error}"
            ) from None

    @property
    def roles(self) -> list[str]:
        """Expressions that ``parameters`` names, unless it names feed-forwards by their layers."""
        return [expression.strip() for expression in self.parameters.split(",")]

    @property
    def feed_forward_layers(self) -> list[int]:
        """Layers that ``parameters`` names; empty unless it names feed-forwards."""
        match = _LAYERS.fullmatch(self.parameters)
        return [] if match is None else list(range(int(match[1]), int(match[2] or match[1]) + 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(_Section):
    """A whole run.

    Attributes:
        model: name of a known model, a folder, or an id on the Hugging Face Hub.
        data: what is read.
        train: how it is trained.
        upcycle: options of ``mixtura.surgery.upcycle.upcycle``, its method among them; None trains the model as it is.
        balance: coefficient by key of a balance method, or a mapping of ``coefficient`` and the method's options; each
            is summed over the layers.
        balance_statistic: key of the load that a load-balancing term sees.
        seed: of everything that is drawn.
        version: of the format of recipes.
    """

    model: str
    data: DataRecipe
    train: TrainRecipe
    upcycle: dict[str, Any] | None = None
    balance: dict[str, Any] = dataclasses.field(default_factory=dict)
    balance_statistic: str = "previous-step-load"
    seed: int = _from_zero(0)
    version: int = _positive(VERSION)

    def __post_init__(self) -> None:
        super().__post_init__()
        checked = {key: _checked_term(key, value) for key, value in self.balance.items()}
        object.__setattr__(self, "balance", checked)
        _of_role("statistic", self.balance_statistic)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values, as YAML or JSON give them.

        Raises:
            FileFormatError: if it is of a newer version, whatever fields that has.
            OptionError: naming the path of what is unknown, missing, of another type or out of range.
        """
        version = values.get("version", VERSION)
        if isinstance(version, int) and version > VERSION:
            raise FileFormatError(f"the recipe has version {version}, known are up to {VERSION}; upgrade mixtura")
        return super().from_dict(values)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file.

        Raises:
            FileFormatError: if there is no such file, or it is no YAML mapping, or of a newer version.
            OptionError: see ``from_dict``.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise FileFormatError(f"recipe {str(path)!r} cannot be read: {error}") from None
        except yaml.YAMLError as error:
            raise FileFormatError(f"recipe {str(path)!r} is no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise FileFormatError(f"recipe {str(path)!r} must be a mapping of fields, got {type(values).__name__}")
        return cls.from_dict(values)

    def to_yaml(self) -> str:
        """The text that ``load`` reads an equal recipe from."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @property
    def training_tokens(self) -> int:
        """Tokens that the run reads."""
        train = self.train
        return train.steps * train.batch_size * train.gradient_accumulation * self.data.sequence_length


def _checked_term(key: str, value: Any) -> Any:
    """A balance term with its numbers as numbers."""
    path = f"balance.{key}"
    method = _of_role("balance", key)
    if not isinstance(value, Mapping):
        return _typed(path, value, float)
    method.check(set(value) - {"coefficient"})
    if "coefficient" not in value:
        raise OptionError(f"{path}.coefficient is missing")
    return {**value, "coefficient": _typed(f"{path}.coefficient", value["coefficient"], float)}


def _of_role(role: str, key: str) -> registry.Method:
    known = {row.key: row for row in registry.methods(role)}
    if key not in known:
        raise OptionError(str(unknown_name(f"method of {role}", key, known)))
    return known[key]


def _typed(path: str, value: Any, hint: Any) -> Any:
    """``value`` as the annotation asks, or an error; YAML reads 4e-4 as text, and a whole number is a float."""
    if isinstance(hint, types.UnionType):
        return None if value is None else _typed(path, value, typing.get_args(hint)[0])
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in parts:
            return value
        raise OptionError(f"{path} must be one of {', '.join(map(repr, parts))}, got {value!r}")
    if origin is dict and isinstance(value, Mapping):
        return {_typed(f"{path}'s names", k, str): _typed(f"{path}.{k}", v, parts[1]) for k, v in value.items()}
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return hint.from_dict(value)  # type: ignore[attr-defined, union-attr]
    if hint is float and (number := _as_float(value)) is not None:
        return number
    wanted = origin or hint
    if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise OptionError(f"{path} must be {_article(wanted)}, got {value!r}")


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _article(wanted: type) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}
    return names.get(wanted, "a mapping of fields")


def _check_range(path: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if value is None or not bounds:
        return
    if "above" in bounds and not bounds["above"] < value < float("inf"):
        raise OptionError(f"{path} must be above {bounds['above']} and finite, got {value}")
    if "minimum" in bounds and not bounds["minimum"] <= value < float("inf"):
        raise OptionError(f"{path} must be at least {bounds['minimum']} and finite, got {value}")
