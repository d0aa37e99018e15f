"""The compiled library: where it is, whether it fits these sources, and at which instruction set it works.

numpy does its work where the library was not built, and where it was built from other sources, which warns once: the
library tells a digest of each function and of each structure that it takes, and they must be those of the ctypes
declarations here and beside each layout. The environment variable ``POCKETREC_KERNEL`` caps the instruction set:
``portable``, ``avx2``, ``avx512`` or ``vnni``, or ``off`` for numpy; without it the best one is used that the processor
has. Arrays are passed by pointer; an index out of range raises :class:`DataError` and reads nothing.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ConfigError, DataError, StorageError

Level = Literal["portable", "avx2", "avx512", "vnni"]
AnyStructure = TypeVar("AnyStructure", bound=type[ctypes.Structure])

LEVELS: tuple[Level, ...] = get_args(Level)
VARIABLE = "POCKETREC_KERNEL"
NUMBERS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int8): 2, np.dtype(np.uint16): 3}
"""How the library counts types of numbers; uint16 holds bits of bfloat16."""
POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
BAD_INDEX, NO_MEMORY = 1, 2

_address: Callable[[Any], int] = ctypes.addressof
_first_byte: Callable[[Any], ctypes.c_char] = ctypes.c_char.from_buffer
_LOOKUP = [POINTER, POINTER, POINTER, LONG, LONG, POINTER, INT]
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "pocketrec_lookup": (_LOOKUP, INT),
    "pocketrec_transform": (_LOOKUP, INT),
    "pocketrec_trellis": (_LOOKUP, INT),
    "pocketrec_spmm": ([POINTER, POINTER, LONG, LONG, LONG, POINTER, INT, POINTER, INT, POINTER, POINTER, POINTER,
                        POINTER, LONG, LONG, INT], INT),
    "pocketrec_topk": ([POINTER, LONG, POINTER, LONG, LONG, POINTER, POINTER, LONG, LONG, POINTER, POINTER, INT], INT),
    "pocketrec_tower": ([POINTER, POINTER, POINTER, POINTER, POINTER, LONG, LONG, LONG, POINTER, POINTER, LONG, POINTER,
                         INT], INT),
    "pocketrec_beam": ([POINTER, LONG, LONG, LONG, POINTER, POINTER, POINTER, POINTER, LONG, LONG, LONG, POINTER], INT),
    "pocketrec_adam_distinct": ([POINTER, LONG, POINTER, LONG, POINTER, POINTER], LONG),
    "pocketrec_adam_catch_up": ([POINTER, POINTER, POINTER, POINTER, LONG, LONG], None),
    "pocketrec_adam_update": ([POINTER, POINTER, POINTER, LONG, POINTER, LONG, POINTER, POINTER, LONG], None),
    "pocketrec_level": ([], INT),
    "pocketrec_limit": ([INT], None),
    "pocketrec_abi": ([ctypes.c_char_p], ctypes.c_uint64),
}  # fmt: skip
_STRUCTURES: dict[str, type[ctypes.Structure]] = {}


def structure(name: str) -> Callable[[AnyStructure], AnyStructure]:
    """Declare a class to be the library's structure ``name``, so that a library with another one is refused."""

    def declared(cls: AnyStructure) -> AnyStructure:
        _STRUCTURES[name] = cls
        return cls

    return declared


def function_digest(name: str) -> int:
    """Digest of a function's declaration, as ``native/src/digest.h`` has it."""
    arguments, result = _FUNCTIONS[name]
    return _fnv(f"{name}({','.join(map(_kind, arguments))}){_kind(result)}")


@cache
def structure_digest(name: str, cls: type[ctypes.Structure]) -> int:
    """Digest of a structure under a name, as ``native/src/digest.h`` has it."""
    fields = [(field, kind) for field, kind, *_ in cls._fields_]
    text = "".join(f"{field}:{_kind(kind)}@{getattr(cls, field).offset};" for field, kind in fields)
    return _fnv(f"{name}{{{text}}}{ctypes.sizeof(cls)}")


def _kind(of: Any) -> str:
    """Letter and size of a type of ctypes; no type is no result."""
    if of is None:
        return "v0"
    letter = {"P": "p", "z": "p", "f": "f", "d": "f"}.get(of._type_, "i" if of._type_.islower() else "u")
    return f"{letter}{ctypes.sizeof(of)}"


def _fnv(text: str) -> int:
    """FNV-1a of 64 bits."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def _cap() -> Level | None:
    """The highest instruction set that the environment allows, or ``None`` for numpy.

    Raises:
        ConfigError: The variable names none.
    """
    named = os.environ.get(VARIABLE) or LEVELS[-1]
    if named not in ("off", *LEVELS):
        raise ConfigError(
            f"{VARIABLE} must be one of off, {', '.join(LEVELS)}, but is {named!r}; unset it for the best level."
        )
    return None if named == "off" else cast(Level, named)


@cache
def _refuse(origin: str, what: str) -> None:
    warnings.warn(
        f"{origin} was compiled from other sources than these ({what}), so numpy does its work, more slowly; build it "
        "again: `pip install .`, or `python setup.py build_ext --inplace` in a checkout.",
        RuntimeWarning,
        stacklevel=5,
    )


@cache
def _opened() -> ctypes.CDLL | None:
    """The library, if its functions are those declared here; at the environment's level."""
    cap, spec = _cap(), find_spec("pocketrec.native._library")
    if cap is None or spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    if missing := [name for name in _FUNCTIONS if not hasattr(library, name)]:
        return _refuse(spec.origin, f"it has no {missing[0]}")
    for name, (arguments, result) in _FUNCTIONS.items():
        getattr(library, name).argtypes, getattr(library, name).restype = arguments, result
    if other := [name for name in _FUNCTIONS if library.pocketrec_abi(name.encode()) != function_digest(name)]:
        return _refuse(spec.origin, f"it has another {other[0]}")
    library.pocketrec_limit(LEVELS.index(cap))
    return library


@cache
def _library(declared: int) -> ctypes.CDLL | None:
    """The library, if its structures are the ones declared so far; asked again when there are more of them."""
    library = _opened()
    if library is None:
        return None
    for name, cls in list(_STRUCTURES.items())[:declared]:
        if library.pocketrec_abi(name.encode()) != structure_digest(name, cls):
            return _refuse(library._name, f"it has another {name}")
    return library


def compiled() -> ctypes.CDLL | None:
    """The compiled library, or ``None``."""
    return _library(len(_STRUCTURES))


def needed() -> ctypes.CDLL:
    """The compiled library, where the caller has no other way.

    Raises:
        ConfigError: It is not available.
    """
    library = compiled()
    if library is None:
        raise ConfigError("The compiled kernel is not available; use the public function, which falls back to numpy.")
    return library


def available() -> bool:
    """Whether the compiled library is in use."""
    return compiled() is not None


def level() -> Level | None:
    """The instruction set in use, or ``None`` for numpy."""
    library = compiled()
    return None if library is None else LEVELS[library.pocketrec_level()]


def limit(most: Level) -> None:
    """Use no instruction set above ``most``; ``vnni`` lifts every limit but the environment's."""
    library, cap = compiled(), _cap()
    if library is not None and cap is not None:
        library.pocketrec_limit(min(LEVELS.index(most), LEVELS.index(cap)))


def pointer(array: NDArray[Any] | None) -> int | None:
    """Address of a contiguous array's data; the buffer is the fastest way, but to none that is empty or read-only."""
    if array is None:
        return None
    try:
        return _address(_first_byte(array))
    except (TypeError, ValueError):
        return array.ctypes.data


def check_status(status: int, what: str) -> None:
    """Raise what a function of the library says went wrong.

    Raises:
        DataError: An index among ``what`` is out of range.
        StorageError: There was no memory.
    """
    if status == BAD_INDEX:
        raise DataError(f"{what} must lie inside the arrays that they point into, but at least one does not.")
    if status == NO_MEMORY:
        raise StorageError("The kernel could not allocate its buffers; free memory or use fewer items.")


def check_array(name: str, array: NDArray[Any], shape: tuple[int, ...], *dtypes: type[np.generic]) -> None:
    """Raise :class:`ConfigError` unless ``array`` is C-contiguous, of ``shape`` and of one of ``dtypes``."""
    if array.shape != shape or array.dtype not in dtypes or not array.flags.c_contiguous:
        expected = " or ".join(np.dtype(d).name for d in dtypes)
        layout = "contiguous" if array.flags.c_contiguous else "strided"
        raise ConfigError(
            f"`{name}` must be contiguous {expected} {shape}, but got {layout} {array.dtype} {array.shape}."
        )
