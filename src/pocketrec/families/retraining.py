"""Retraining: a fixed mask, and the values under it learned again from where they started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec import settings
from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError, UnsupportedOp
from pocketrec.models.backbone import Model
from pocketrec.models.baked import BakedModel
from pocketrec.models.pruned import PrunedTable, own_absent
from pocketrec.models.table import DenseTable, Lookup, Table
from pocketrec.randomness import derive
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

HeadStart = Literal["fresh", "initial"]
Goal = Literal["rows", "final"]


@dataclass(frozen=True)
class Start:
    """Where a method that trains starts.

    Args:
        kind: ``fresh`` starts from random numbers, as published; ``trained`` at the weights of the trained model that
            is given; ``taught`` lets a computed table learn the vectors of that model first, and keeps its head.
        epochs: in which a ``taught`` table learns, at least 1.
        rate: learning rate of these epochs, above 0; a fifth of it in the last quarter of them; by default the
            method's.
        goal: what is learned then: the ``rows`` of the trained table, or the ``final`` vectors that a ranking model
            makes of them, 50 steps an epoch.

    Example:
        >>> Start("taught", epochs=14, goal="final").kind
        'taught'
    """

    kind: Literal["fresh", "trained", "taught"] = "fresh"
    epochs: int = 12
    rate: float | None = None
    goal: Goal = "rows"

    def __post_init__(self) -> None:
        settings.check(self, epochs=1)
        settings.check_above(self, rate=0)


@dataclass(frozen=True)
class Retrain:
    """Where the retraining of a search's result starts.

    Args:
        head: ``fresh`` trains a new head, ``initial`` the head of the search from where it started.
        values: at the ``first`` values, as published; or at those that the search ``found``, and then at its head, too.
    """

    head: HeadStart = "fresh"
    values: Literal["first", "found"] = "first"

    def __post_init__(self) -> None:
        settings.check(self)


class TrainingMethod(Method):
    """A method that trains, from a :class:`Start` of its own.

    Args:
        start: ``fresh``, as published, or at the weights of the ``trained`` model.
        search: for a mask, or for lengths.
        retrain: where what was found is trained again.
    """

    trains: ClassVar[bool] = True
    starts: ClassVar[tuple[str, ...]] = ("fresh", "trained")
    """The kinds of start that it knows."""

    start: Start

    @property
    def starts_from(self) -> Literal["trained", "fresh"]:
        """Whether the weights of the given model count."""
        return "fresh" if self.start.kind == "fresh" else "trained"

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.one_of("start.kind", self.start.kind, self.starts)


class MaskedTable(Lookup):
    """A pruned table in training: ``base * keep`` is learned, and entries outside ``keep`` stay zero.

    It reads as the :class:`~pocketrec.models.pruned.PrunedTable` of its values does: a row that is stored nowhere reads
    its field's out-of-vocabulary row where that is the field's absent row, else zeros.

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
        self.schema, self.blocks, self.counts = table.schema, table.blocks, counts
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


def initial_model(model: Model, data: Dataset, run: Run, start: Start) -> tuple[Model, DenseTable]:
    """The model as every training of this run starts, and its dense table.

    Only the configuration of ``model`` counts where the start is ``fresh``.

    Raises:
        UnsupportedOp: the model is baked, so that there is nothing to train.
        ConfigError: the model to start from has no dense table.
    """
    if isinstance(model, BakedModel):
        raise UnsupportedOp(
            "A method that trains needs the model before its propagation, but got baked vectors; leave `bake` out."
        )
    first = model.backbone.build(data, run.seed) if start.kind == "fresh" else model
    if not isinstance(first.table, DenseTable):
        raise ConfigError(f"A method that trains must start from a dense table, but got {type(first.table).__name__}.")
    return first, first.table


def search_training(run: Run, data: Dataset, epochs: int | None) -> Training:
    """The settings of a search: those of the run's first stage with dense Adam, by default for half of its epochs."""
    first = run.stages(data.schema.task)[0]
    return replace(first, epochs=epochs or -(-first.epochs // 2), optimizer="adam")


def retraining_model(start: Model[Lookup], head: HeadStart, data: Dataset, run: Run) -> Model[Lookup]:
    """The model around which a mask is trained: ``start`` itself, or a fresh one."""
    return start if head == "initial" else start.backbone.build(data, derive(run.seed, "retrain"))


def retrain(start: Model[Lookup], table: Table, head: HeadStart, data: Dataset, run: Run) -> Model:
    """Train the values of a pruned ``table`` under its mask, and the head; the model around the learned table.

    Args:
        start: the model as the search started.
        table: mask, and values to start from.
        head: ``initial`` keeps the head (and the linear weights) of ``start``; ``fresh`` draws them again.
        data: training and validation rows.
        run: keeps the result, and says how to train.

    Raises:
        ConfigError: the table is not a pruned one.
    """
    if not isinstance(table, PrunedTable):
        raise ConfigError(f"Retraining needs a pruned table, but got {type(table).__name__}.")
    start = retraining_model(start, head, data, run)
    if head == "fresh":
        fresh, base = start.table.weight().detach(), table.base.detach().clone()
        for block in table.blocks:
            if not block.counted:
                area = slice(block.start, block.stop), slice(block.left, block.right)
                base[area] = fresh[area]
        table = PrunedTable.from_counts(table.schema, table.blocks, base, table.keep, table.fill, data.counts)
    masked = start.with_table(MaskedTable(table, data.counts))
    fitted = run.fit("retrain", masked, data)
    return fitted.with_table(fitted.table.pruned())
