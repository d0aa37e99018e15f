"""How small a model must be: bytes of the file, a share of its values, or a sparsity."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pocketrec.errors import BudgetError, ConfigError
from pocketrec.format.block import Storage
from pocketrec.format.entries import Index
from pocketrec.format.vocabulary import size_for as vocabulary_size_for
from pocketrec.schema import Schema

_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Budget:
    """How small: ``sparsity`` (values removed), ``share`` (of dense fp32 table bytes kept), ``bytes`` (of the file).

    Example:
        >>> Budget.parse("sparsity=0.95"), Budget.parse("5%"), Budget.parse("4 MiB")
        (Budget(kind='sparsity', amount=0.95), Budget(kind='share', amount=0.05), Budget(kind='bytes', amount=4194304))
    """

    kind: Literal["sparsity", "share", "bytes"]
    amount: float

    @property
    def storage(self) -> Storage:
        """How values are stored unless the caller says so."""
        return "fp32" if self.kind == "sparsity" else "int8"

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """Read ``sparsity=0.95``, ``5%``, ``4MiB`` or ``4 MiB``."""
        if isinstance(text, Budget):
            return text
        number = r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*"
        if (m := re.fullmatch(rf"\s*sparsity\s*={number}", text)) and 0 <= float(m[1]) < 1:
            return cls("sparsity", float(m[1]))
        if (m := re.fullmatch(rf"{number}%\s*", text)) and 0 < float(m[1]) <= 100:
            return cls("share", float(m[1]) / 100)
        if (m := re.fullmatch(rf"{number}({'|'.join(_UNITS)})\s*", text)) and float(m[1]) > 0:
            return cls("bytes", int(float(m[1]) * _UNITS[m[2]]))
        raise ConfigError(
            f"`budget` must be like 'sparsity=0.95' (0 <= s < 1), '5%' (0 < p <= 100) or '4MiB', but got {text!r}."
        )


@dataclass(frozen=True)
class Room:
    """What a table may take: so many values, or so many bytes in a file.

    Attributes:
        values: most counted scalars that it keeps (linear weights untouched), unless bytes bound it.
        size_bytes: most bytes of its packed form, all blocks and side arrays included, unless values bound it.
        storage: how kept values are stored.
        index: how a file finds a row.
        keys: whether the keys of the stored rows share the bytes.

    Example:
        >>> Room(size_bytes=4096, storage="int8").most, Room(values=300).most
        (4096, 300)
    """

    values: int | None = None
    size_bytes: int | None = None
    storage: Storage = "fp32"
    index: Index = "compact"
    keys: bool = False

    def __post_init__(self) -> None:
        if (self.values is None) == (self.size_bytes is None):
            raise ConfigError(
                "A room must have either `values` or `size_bytes`, but got "
                f"values={self.values}, size_bytes={self.size_bytes}."
            )

    @property
    def most(self) -> int:
        """The bound: values or bytes, whichever is given."""
        return self.values or 0 if self.size_bytes is None else self.size_bytes

    def key_bytes(self, schema: Schema, keys: Sequence[int]) -> int:
        """What the keys of so many stored rows of each field, ``(F,)``, take of the bytes: nothing without ``keys``."""
        return vocabulary_size_for(schema, keys) if self.keys else 0

    def below(self, least: int, what: str, advice: str = "raise the budget.") -> BudgetError:
        """That the bytes are fewer than the ``least`` of ``what``, such as ``"that the gains need"``."""
        message = f"Budget {self.most:,} B is below the {least:,} B {what}; {advice}"
        return BudgetError(message, least_bytes=least)


def values_below(values: int, least: int, what: str, advice: str = "raise the budget.") -> BudgetError:
    """That so many values are fewer than the ``least`` of ``what``."""
    return BudgetError(f"A budget of {values:,} values is below the {least:,} {what}; {advice}", least_values=least)


def largest_fitting(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in ``[low, high]`` that fits, if every smaller one does; ``low`` is taken to.

    Example:
        >>> largest_fitting(0, 10, lambda n: n * n <= 50)
        7
    """
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
