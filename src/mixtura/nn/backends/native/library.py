"""The shared library: found, loaded and declared once."""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

from mixtura.core.errors import MixturaWarning, OptionError, unknown_name
from mixtura.nn.backends.native.build import interface

PATH = Path(__file__).with_name("libmixtura_native.so")

_POINTER, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class ExpertsStruct(ctypes.Structure):
    """``mixtura_experts`` of mixtura_native.h."""

    _fields_ = (
        *((name, _I64) for name in ("num_experts", "dim", "width")),
        *((name, _POINTER) for name in ("first", "first_bias", "down", "down_bias")),
        *((name, ctypes.c_int32) for name in ("dtype", "activation", "gated", "transposed", "interleaved")),
        *((name, ctypes.c_float) for name in ("alpha", "limit")),
    )


class GradientsStruct(ctypes.Structure):
    """``mixtura_gradients`` of mixtura_native.h."""

    _fields_ = tuple(
        (name, _POINTER) for name in ("out", "hidden", "weights", "first", "first_bias", "down", "down_bias")
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or None if there is none that can be used; see ``why_no_library``."""
    return _loaded()[0]


def why_no_library() -> str:
    """Why there is no library, "" if there is one."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    lib, reason = load(PATH)
    if reason and PATH.exists():
        message = f"{PATH.name}: {reason}; torch computes experts until mixtura is installed again (pip install)"
        warnings.warn(message, MixturaWarning, stacklevel=3)
    return lib, reason


def load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library of a file, or None and the reason: it is not there, not loadable, or of another version.

    The version is that of the headers; one that was built from others would read arguments that are not there.
    """
    if not path.exists():
        return None, "the library was not built, for want of a C++ compiler"
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the library cannot be loaded: {' '.join(str(error).split())}"
    if not hasattr(lib, "mixtura_interface"):
        return None, "the library is of an older version"
    lib.mixtura_interface.restype = ctypes.c_char_p
    if (found := lib.mixtura_interface().decode()) != (expected := interface()):
        return None, f"the library is of another version, interface {found} instead of {expected}"
    return _declared(lib), ""


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    experts = ctypes.POINTER(ExpertsStruct)
    lib.mixtura_workspace.argtypes = [experts, _I64, _I64, _I32, _I32]
    lib.mixtura_workspace.restype = _I64
    lib.mixtura_experts_forward.argtypes = [experts, *[_POINTER] * 6, _I64, _I64, _I32]
    gradients = ctypes.POINTER(GradientsStruct)
    lib.mixtura_experts_backward.argtypes = [experts, *[_POINTER] * 4, gradients, _POINTER, _I64, _I64, _I32]
    lib.mixtura_quantized_workspace.argtypes = [_POINTER, _I64, _I64, _I32]
    lib.mixtura_quantized_workspace.restype = _I64
    lib.mixtura_quantized_forward.argtypes = [*[_POINTER] * 6, _I64, _I64, _I32]
    for name in ("mixtura_mixture_workspace", "mixtura_tape_scratch", "mixtura_attention_parts"):
        getattr(lib, name).restype = _I64
    lib.mixtura_mixture_workspace.argtypes = [_POINTER, _I64, _I32]
    lib.mixtura_tape_scratch.argtypes = [_POINTER, _I64]
    lib.mixtura_attention_parts.argtypes = [_POINTER, _I64, _I64]
    lib.mixtura_run_tape.argtypes = [_POINTER]
    lib.mixtura_read_bandwidth.argtypes = [_POINTER, _I64, _I32]
    lib.mixtura_read_bandwidth.restype = ctypes.c_double
    lib.mixtura_isa.restype = lib.mixtura_isas.restype = ctypes.c_char_p
    return lib


def instructions() -> tuple[str, list[str]]:
    """The instruction set in use, and all that this processor has, the best first; ("", []) without the library."""
    lib = library()
    return ("", []) if lib is None else (lib.mixtura_isa().decode(), lib.mixtura_isas().decode().split())


def use_instructions(name: str) -> None:
    """Use another instruction set from now on, in this process.

    Raises:
        OptionError: if there is no library.
        UnknownNameError: if this processor does not have it.
    """
    lib = library()
    if lib is None:
        raise OptionError(f"there are no native experts: {why_no_library()}")
    if lib.mixtura_use_isa(name.encode()):
        raise unknown_name("instruction set", name, instructions()[1])
