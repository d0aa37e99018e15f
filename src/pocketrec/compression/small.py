"""A compressed model: the same head around a smaller table, and its file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pocketrec import settings
from pocketrec.compression.budget import Budget
from pocketrec.compression.ladder import Method
from pocketrec.files import canonical_json
from pocketrec.format.artifact import Contents, FileKind
from pocketrec.format.block import Storage
from pocketrec.format.entries import Index
from pocketrec.format.packed import Packed
from pocketrec.format.vocabulary import Vocabulary
from pocketrec.models.backbone import Model, RankingModel
from pocketrec.models.table import Table

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset
    from pocketrec.training.loop import Training


_BUDGET_DIGITS = 16
"""Width of a budget in the header, so that no size depends on it."""


@dataclass(frozen=True)
class Small:
    """A compressed model: the same head around a smaller table.

    Attributes:
        model: the model, with ``model.table`` the smaller table.
        data: the data set that it was trained on; its vocabulary goes into the file.
        method: how the table was found.
        budget: what was asked for.
        storage: how kept values are stored in the file.
        index: how the file finds a row.
        training: how a method that trains was told to.
    """

    model: Model
    data: Dataset
    method: Method
    budget: Budget
    storage: Storage
    index: Index = "compact"
    training: tuple[Training, ...] = ()

    @property
    def table(self) -> Table:
        """The smaller table."""
        return self.model.table

    @cached_property
    def values(self) -> int:
        """Learned scalars that survive."""
        return self.table.values()

    @property
    def sparsity(self) -> float:
        """Share of counted scalars that were removed."""
        return 1 - self.values / counted_values(self.table)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the file and its parts, before it is written."""
        return self.contents.sizes()

    @cached_property
    def contents(self) -> Contents:
        """What goes into the file."""
        stored = self.table.stored().numpy()
        vocabulary, rows = Vocabulary.build(self.data.schema, stored, self.data.hashes)
        return self._around(vocabulary, self.table.pack(self.storage, rows, self.index))

    @property
    def bare_header(self) -> int:
        """Bytes of the header of a file without rows."""
        fields, none = self.data.schema.width, np.zeros(0, np.uint32)
        side = np.zeros((fields, 0), np.float32)
        vocabulary = Vocabulary(self.data.schema, (0,) * fields, 0, none, none)
        return self._around(vocabulary, Packed(0, (), side, side)).sizes()["header"]

    def _around(self, vocabulary: Vocabulary, packed: Packed) -> Contents:
        """A file of this model around some rows."""
        backbone = self.model.backbone
        info = {
            "backbone": {"name": backbone.name, "config": settings.to_json(backbone)},
            "method": self.method.config(),
            "budget": asdict(self.budget),
            "storage": self.storage,
            "values": self.values,
            "sparsity": self.sparsity,
            "data": self.data.digest,
            **({"training": [settings.to_json(stage) for stage in self.training]} if self.training else {}),
        }
        digits = len(canonical_json(self.budget.amount))
        blank = max(0, _BUDGET_DIGITS - digits) if self.budget.kind == "bytes" else 0
        return Contents(file_kind(self.model), self.data.schema, vocabulary, packed, self.model.lower(), info, blank)

    def save(self, path: str | Path) -> dict[str, int]:
        """Write the file atomically; bytes of the file and its parts."""
        return self.contents.write(path)


def counted_values(table: Table) -> int:
    """Scalars of the counted blocks of the dense table."""
    return sum(b.values for b in table.blocks if b.counted)


def file_kind(model: Model) -> FileKind:
    """What a file of the model is: ``ctr``, or ``ego`` or ``baked`` of a ranking model."""
    if not isinstance(model, RankingModel):
        return "ctr"
    return "ego" if model.propagates else "baked"
