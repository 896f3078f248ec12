"""Fitted mixtures in files: numbers as safetensors, options as JSON in the header; no pickle.

What a stream has told so far is kept too, so that ``partial_fit`` goes on after ``load`` as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_is_fitted

from mixtura.core.errors import FileFormatError, OptionError
from mixtura.core.files import write_file
from mixtura.density._base import MixtureBase
from mixtura.density._parameters import precision_roots
from mixtura.density._statistics import Statistics
from mixtura.density._streaming import Stream
from mixtura.density.families import find_family
from mixtura.density.priors import NIW

FORMAT = "mixtura.density/1"
NOTES = ("noise_log_density_", "n_iter_", "converged_", "lower_bound_", "lower_bounds_")
Tensors = dict[str, NDArray[Any]]


class Saved:
    """``save`` and ``load`` of what has a state: a named tuple of arrays."""

    _state: Any
    _state_type: Any
    _set_state: Callable[[Any], None]

    def save(self, path: str | Path) -> None:
        """Write parameters and options to one safetensors file, whole or not at all.

        Raises:
            OptionError: if there are constraints or a random generator among the options, which are not kept in files,
                or if options were changed after the fit, so that they say other than what was fitted.
        """
        from safetensors.numpy import save_file

        check_is_fitted(self)
        try:
            self._check_state()
        except ValueError as error:
            raise OptionError(f"what is fitted is not what the options say; fit again before save: {error}") from error
        tensors = _prefixed("state", self._state._asdict())
        stream = getattr(self, "_stream", None)
        about = {
            "format": FORMAT,
            "class": type(self).__name__,
            "options": json.dumps(_options(self, tensors)),
            "notes": json.dumps({name: getattr(self, name) for name in NOTES if hasattr(self, name)}, default=_number),
            "columns": json.dumps([str(name) for name in getattr(self, "feature_names_in_", [])]),
            "stream": json.dumps(None if stream is None else [stream.n_batches, stream.weight]),
        }
        if stream is not None:
            tensors |= _prefixed("prior", dataclasses.asdict(stream.prior) if stream.prior else {})
            tensors |= _prefixed("kept", dataclasses.asdict(stream.kept) if stream.kept else {})
        with write_file(Path(path)) as partial:
            save_file(tensors, partial, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            FileFormatError: if the file is not one of a mixture of this class.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "np") as file:
                about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise FileFormatError(f"{str(path)!r} is not a safetensors file: {error}") from error
        if about.get("format") != FORMAT or about.get("class") != cls.__name__:
            raise FileFormatError(f"{str(path)!r} holds no {cls.__name__} of format {FORMAT}")
        try:
            return cls._restore(about, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{str(path)!r} is damaged: {error}") from error

    @classmethod
    def _restore(cls, about: dict[str, str], tensors: Tensors) -> Self:
        options, columns, stream = (json.loads(about[name]) for name in ("options", "columns", "stream"))
        if options.get("init") == {"tensor": "init"}:
            options["init"] = tensors["init"]
        if options.get("prior") is not None:
            options["prior"] = NIW(**options["prior"])
        self = cls(**options)
        self._set_state(cls._state_type(**_part("state", tensors)))
        for name, value in json.loads(about["notes"]).items():
            if name in NOTES:
                setattr(self, name, value)
        if columns:
            self.feature_names_in_ = np.asarray(columns, dtype=object)
        if stream is not None:
            self._stream = _stream(stream, tensors)
        self._check_state()
        return self

    def _check_state(self) -> None:
        """Raise ``ValueError`` unless what was read fits the options."""
        raise NotImplementedError


class SavedMixture(Saved, MixtureBase):
    """``save`` and ``load`` of a mixture."""

    def _check_state(self) -> None:
        K, D = self.means_.shape
        shape = (K, D) if find_family(self.covariance).diagonal else (K, D, D)
        if self.n_components != K or self.weights_.shape != (K,) or self._covariances.shape != shape:
            raise ValueError(
                f"n_components={self.n_components} and covariance={self.covariance!r} do not go with means of shape "
                f"{self.means_.shape} and covariances of shape {self._covariances.shape}"
            )
        if not np.isclose(self.weights_.sum() + self.noise_weight_, 1) or not np.isfinite(self.means_).all():
            raise ValueError("weights or means are not those of a mixture")
        precision_roots(self._covariances)


def _prefixed(prefix: str, values: dict[str, Any]) -> Tensors:
    return {f"{prefix}.{name}": np.array(value, dtype=float, order="C") for name, value in values.items()}


def _part(prefix: str, tensors: Tensors) -> dict[str, Any]:
    """The tensors of a prefix; numbers without an axis as floats."""
    found = {name.split(".", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
    return {name: value.item() if value.size == 1 and value.ndim == 0 else value for name, value in found.items()}


def _stream(given: list[Any], tensors: Tensors) -> Stream:
    prior, kept = _part("prior", tensors), _part("kept", tensors)
    n_batches, weight = int(given[0]), float(given[1])
    return Stream(NIW(**prior) if prior else None, Statistics(**kept) if kept else None, n_batches, weight)


def _options(mixture: Any, tensors: Tensors) -> dict[str, Any]:
    """Options that JSON can hold; an array to start from goes among the tensors."""
    options = mixture.get_params(deep=False)
    if options.get("constraints") is not None:
        raise OptionError("constraints are not kept in files; set constraints=None before save")
    if not isinstance(options["init"], str):
        tensors["init"], options["init"] = np.ascontiguousarray(options["init"]), {"tensor": "init"}
    if options["prior"] is not None:
        prior = dataclasses.asdict(options["prior"])
        options["prior"] = {
            name: value.tolist() if hasattr(value, "tolist") else value for name, value in prior.items()
        }
    try:
        return json.loads(json.dumps(options, default=_number))
    except TypeError as error:
        raise OptionError(f"an option cannot be kept in a file: {error}") from error


def _number(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a number or a word")
