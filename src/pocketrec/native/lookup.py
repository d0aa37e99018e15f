"""Look-up in packed tables by the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ConfigError
from pocketrec.native import library
from pocketrec.native.library import LONG, POINTER, pointer

ASKED = (("rows", POINTER), ("fields", POINTER), ("count", LONG), ("columns", LONG), ("out", POINTER))
"""Last members of some tables, which the library itself fills in."""


@dataclass(frozen=True)
class Table:
    """A whole table as the library reads it.

    Attributes:
        function: of the library, which looks up in such a table.
        view: the table.
        fields: how many it has.
        held: what its pointers lead to.
    """

    function: str
    view: ctypes.Structure
    fields: int
    held: object = field(repr=False)

    @cached_property
    def call(self) -> Callable[..., int]:
        """The look-up in this table."""
        return partial(getattr(library.compiled(), self.function), ctypes.byref(self.view))


def lookup(
    table: Table, rows: NDArray[np.int64], fields: NDArray[np.int32], out: NDArray[np.float32], threads: int = 1
) -> None:
    """Packed look-up ``rows (B, C) -> out (B, C, D)`` by the compiled library, which must be available.

    :meth:`pocketrec.format.packed.Packed.lookup` is the public form, and its ``lookup_numpy`` the reference.

    Raises:
        ConfigError: There is no library, or a field is out of range.
    """
    library.needed()
    status = table.call(pointer(rows), pointer(fields), rows.size, len(fields), pointer(out), threads)
    if status == library.BAD_INDEX:
        raise ConfigError(f"`fields` must lie in [0, {table.fields}), but got {np.unique(fields).tolist()}.")
    library.check_status(status, "`rows`")
