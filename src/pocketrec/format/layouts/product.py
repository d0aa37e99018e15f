"""Layout ``product``: the vector of a slot is put together from one row of each of two small tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pocketrec.format.computed import ComposedBlock, Shape, whole

OPERATIONS = ("mult", "add", "concat")


class ProductBlock(ComposedBlock):
    """``e_i = R[i mod p] * Q[i div p]`` for slots ``i`` in ``[0, slots)``; or their sum; or two halves side by side.

    Settings: ``slots``, ``divisor`` ``p``, ``operation``. Factors: ``remainder (p, w)`` and ``quotient (q, w)``,
    ``q = ceil(slots / p)``, ``w`` the width of the block or, for ``concat``, half of it.
    """

    @property
    def slots(self) -> int:
        """Vectors that can be computed."""
        return self.settings["slots"]

    def sound(self) -> bool:
        """Whether the settings are possible at all."""
        operation = self.settings.get("operation")
        even = operation != "concat" or self.width % 2 == 0
        return whole(self.settings, "slots", "divisor") and operation in OPERATIONS and even

    def factors(self) -> dict[str, Shape]:
        """Shapes of the two tables."""
        divisor = self.settings["divisor"]
        width = self.width // 2 if self.settings["operation"] == "concat" else self.width
        return {"remainder": (divisor, width), "quotient": (-(-self.slots // divisor), width)}

    def vectors(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Slots ``(m,)`` -> vectors ``(m, width)``."""
        quotient, remainder = np.divmod(slots, self.settings["divisor"])
        left, right = self.factor("remainder", remainder), self.factor("quotient", quotient)
        if self.settings["operation"] == "concat":
            return np.concatenate([left, right], axis=1)
        return left * right if self.settings["operation"] == "mult" else left + right
