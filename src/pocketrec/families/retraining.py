"""Retraining: a fixed mask, and the values under it learned again from where they started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.errors import ConfigError, UnsupportedOp
from pocketrec.format.block import Storage
from pocketrec.format.entries import Index
from pocketrec.format.packed import Packed
from pocketrec.models.backbone import Model
from pocketrec.models.baked import BakedModel
from pocketrec.models.pruned import PrunedTable, own_absent
from pocketrec.models.table import DenseTable, Table
from pocketrec.randomness import derive
from pocketrec.schema import Task
from pocketrec.training.run import Run

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset
    from pocketrec.training.loop import Training

HeadStart = Literal["fresh", "initial"]
"""Where a retrained head starts: from other random numbers than the search, or where the search started."""

ValueStart = Literal["first", "found"]
"""Where retrained values start: where the search started, or where it ended; then its head does, too."""

Origin = Literal["fresh", "trained"]
"""Where a method that trains starts: from random numbers, as published, or from the trained model that it is given."""


class MaskedTable(Table):
    """A pruned table in training: ``base * keep`` is learned, and entries outside ``keep`` stay zero.

    It reads as the :class:`~pocketrec.models.pruned.PrunedTable` of its values does: a row that is stored nowhere reads its
    field's out-of-vocabulary row where that is the field's absent row, else zeros.

    Args:
        table: mask and values to start from; its ``fill`` must be zero.
        counts: training occurrences per row, ``(n,)``; they choose the absent rows.
    """

    keep: Tensor
    source: Tensor

    def __init__(self, table: PrunedTable, counts: NDArray[np.int64]) -> None:
        super().__init__()
        if bool(table.fill.any()):
            raise ConfigError("Retraining needs removed entries that read zero, but `fill` is not zero.")
        self.schema = table.schema
        self.blocks = table.blocks
        self.counts = counts
        self.kept = table.keep
        keep, source = table.keep.clone(), torch.arange(self.schema.rows)
        for field, own in zip(self.schema.fields, own_absent(self.schema, keep, counts), strict=True):
            rows = slice(field.offset, field.stop)
            if own:
                source[rows] = torch.where(table.present[rows], source[rows], field.stop - 1)
            elif field.oov_row is not None:
                keep[field.oov_row] = False
        self.redirected = bool((source != torch.arange(self.schema.rows)).any())
        self.register_buffer("keep", keep)
        self.register_buffer("source", source)
        self.base = nn.Parameter(torch.where(table.keep, table.base.detach(), 0))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        rows = self.source[ids] if self.redirected else ids
        return torch.where(self.keep[rows], self.base[rows], 0)

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        weight = torch.where(self.keep, self.base, 0)
        return weight[self.source] if self.redirected else weight

    def pruned(self) -> PrunedTable:
        """The same table, no longer in training."""
        fill = torch.zeros(self.schema.width, self.width)
        return PrunedTable.from_counts(self.schema, self.blocks, self.base.detach().cpu(), self.kept, fill, self.counts)

    def values(self) -> int:
        """Kept scalars of the counted blocks."""
        return self.pruned().values()

    def stored(self) -> Tensor:
        """Rows that keep something, but the out-of-vocabulary rows."""
        return self.pruned().stored()

    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """As the pruned table packs."""
        return self.pruned().pack(storage, rows, index)


def initial_model(model: Model, data: Dataset, run: Run, origin: Origin = "fresh") -> tuple[Model, DenseTable]:
    """The model as every training of this run starts, and its dense table.

    Only the configuration of ``model`` counts, unless its weights are the ``origin``.

    Raises:
        UnsupportedOp: the model is baked, so that there is nothing to train.
        ConfigError: the model to start from has no dense table.
    """
    if isinstance(model, BakedModel):
        raise UnsupportedOp(
            "A method that trains needs the model before its propagation, but got baked vectors; leave `bake` out."
        )
    if origin not in ("fresh", "trained"):
        raise ConfigError(f"`origin` must be 'fresh' or 'trained', but got {origin!r}.")
    start = model if origin == "trained" else model.backbone.build(data, run.seed)
    if not isinstance(start.table, DenseTable):
        raise ConfigError(f"A method that trains must start from a dense table, but got {type(start.table).__name__}.")
    return start, start.table


def search_training(training: Sequence[Training], task: Task, epochs: int | None) -> Training:
    """The settings of a search: those of the first stage with dense Adam, by default for half of its epochs."""
    from pocketrec.training.loop import Training

    first = training[0] if training else Training.default(task)
    return replace(first, epochs=epochs or -(-first.epochs // 2), optimizer="adam")


def retraining_model(start: Model, head: HeadStart, data: Dataset, run: Run) -> Model:
    """The model around which a mask is trained: ``start`` itself, or a fresh one."""
    return start if head == "initial" else start.backbone.build(data, derive(run.seed, "retrain"))


def retrain(
    start: Model, table: PrunedTable, head: HeadStart, data: Dataset, run: Run, training: Sequence[Training]
) -> Model:
    """Train the values of ``table`` under its mask, and the head; the model around the learned pruned table.

    Args:
        start: the model as the search started.
        table: mask, and values to start from.
        head: ``initial`` keeps the head (and the linear weights) of ``start``; ``fresh`` draws them again.
        data: training and validation rows.
        run: keeps the result.
        training: stages; none for the defaults of the task.
    """
    start = retraining_model(start, head, data, run)
    if head == "fresh":
        fresh, base = start.table.weight().detach(), table.base.detach().clone()
        for block in table.blocks:
            if not block.counted:
                area = slice(block.start, block.stop), slice(block.left, block.right)
                base[area] = fresh[area]
        table = PrunedTable.from_counts(table.schema, table.blocks, base, table.keep, table.fill, data.counts)
    masked = start.with_table(MaskedTable(table, data.counts))
    fitted = run.fit("retrain", masked, data, tuple(training) or None)
    learned = fitted.table
    if not isinstance(learned, MaskedTable):
        raise ConfigError(f"Retraining must leave a masked table, but got {type(learned).__name__}.")
    return fitted.with_table(learned.pruned())
