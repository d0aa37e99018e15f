"""How small a model must be: bytes of the file, a share of its values, or a sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pocketrec.errors import ConfigError

if TYPE_CHECKING:
    pass


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
