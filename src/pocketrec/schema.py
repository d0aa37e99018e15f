"""What the columns are: fields, their ranges of global ids, and the task.

Ids are global everywhere: a value with local id ``i`` in field ``f`` has id ``f.offset + i``, so one table of
``schema.rows`` rows serves all fields. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ConfigError

Task = Literal["ctr", "cf"]
Keys = Literal["hashed", "dense"]


@dataclass(frozen=True)
class Field:
    """One categorical column and its range of rows in the table.

    ``keys="dense"``: the raw values are integers and ``first + i`` has local id ``i``; no vocabulary is needed.
    ``keys="hashed"``: the raw values are strings, found through a vocabulary.
    ``oov``: the last local id, ``size - 1``, stands for every value that has no id of its own.
    """

    name: str
    size: int
    offset: int
    keys: Keys = "hashed"
    first: int = 0
    oov: bool = True

    @property
    def stop(self) -> int:
        """One past the last global id."""
        return self.offset + self.size

    @property
    def oov_row(self) -> int | None:
        """Global id of the out-of-vocabulary row, or ``None`` where the field has none."""
        return self.stop - 1 if self.oov else None


@dataclass(frozen=True)
class Schema:
    """The fields of one data set, in column order; ``cf`` data has exactly two: users, then items."""

    task: Task
    fields: tuple[Field, ...]

    def __post_init__(self) -> None:
        offset = 0
        for field in self.fields:
            if field.size < 1 or field.offset != offset:
                raise ConfigError(
                    f"`fields` must tile the table without gaps: expected field {field.name!r} to start at {offset} "
                    f"with at least one row, but got offset={field.offset}, size={field.size}."
                )
            offset = field.stop
        if self.task == "cf" and len(self.fields) != 2:
            raise ConfigError(f"Task 'cf' needs exactly two fields (user, item), but got {len(self.fields)}.")

    @property
    def rows(self) -> int:
        """Rows of the table, all fields together."""
        return self.fields[-1].stop if self.fields else 0

    @property
    def width(self) -> int:
        """Number of fields ``F``: ids have shape ``(B, F)``."""
        return len(self.fields)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """First global id of each field, and ``rows`` at the end: shape ``(F + 1,)``."""
        return np.array([f.offset for f in self.fields] + [self.rows], dtype=np.int64)

    @cached_property
    def field_of_row(self) -> NDArray[np.int32]:
        """Field index of each row: shape ``(rows,)``."""
        return np.repeat(np.arange(self.width, dtype=np.int32), np.diff(self.offsets))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready document; ``Schema.from_json`` reads it back."""
        return {"task": self.task, "fields": [asdict(f) for f in self.fields]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Schema:
        """Read what ``to_json`` wrote."""
        return cls(task=document["task"], fields=tuple(Field(**f) for f in document["fields"]))
