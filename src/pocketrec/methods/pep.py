"""PEP: thresholds that are learned with the table decide which entries survive; these are trained again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.compression.ladder import Ladder, Method
from pocketrec.data.dataset import Dataset
from pocketrec.errors import BudgetError, ConfigError
from pocketrec.families.pruning import PruningLadder, RankingScope, carry_uncounted
from pocketrec.families.retraining import HeadStart, ValueStart, initial_model, retrain, search_training
from pocketrec.families.thresholds import Falls, check_search, first_threshold, rising_rate, shrink
from pocketrec.format.block import Storage
from pocketrec.format.entries import Index
from pocketrec.format.packed import Packed
from pocketrec.models.backbone import Model
from pocketrec.models.pruned import PrunedTable
from pocketrec.models.table import DenseTable, counted_cells
from pocketrec.training.hooks import ActiveTable, Rule
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

Granularity = Literal["global", "dimension", "feature", "field", "feature_dim", "field_dim"]


@dataclass(frozen=True)
class PEP(Method):
    """Learn a soft threshold with the table, keep what stays above it longest, and train that again from its start.

    In the search the table reads ``sign(e) relu(|e| - sigmoid(s))``. Coupled weight decay pulls ``s`` up from below by
    about one learning rate a step, whatever its size, so thresholds rise until every entry that the loss does not hold
    up is gone. One search serves all budgets: the ``B`` entries that stay longest survive, those of one check by their
    margin ``|e| - sigmoid(s)``. They start again from their first values, with the mask fixed.

    Args:
        granularity: who shares a threshold: everything (``global``), a column (``dimension``), a row (``feature``), a
            field, nobody (``feature_dim``), or a field and column.
        start: first ``s``, below 0; by default the threshold starts at 1/20 of the mean first magnitude.
        reach: threshold that the default rate aims at, in (0, 0.5]; only where ``threshold_rate`` is left open. The
            search ends below it: at about .08 for .3, since Adam remembers the larger decay of its beginning.
        threshold_rate: learning rate of ``s``, above 0; by default such that the threshold rises towards ``reach``.
        threshold_decay: weight decay of ``s``, above 0: nothing is pruned without.
        search_epochs: epochs of the search, at least 1; by default half of those of the first training stage.
        checks: how often the search notes what is below its threshold, at least 1.
        stop: ``exact`` keeps as many entries as asked for, ``published`` those of the first check with at most so many.
        clip: largest norm of the search's gradient; 0 does not clip.
        head: ``fresh`` trains a new head on the mask, ``initial`` the search's head from its start.
        restart: where the retraining starts: at the ``first`` values, as published, with the ``head`` that is asked
            for; or at the values and the head that the search ``found``.
        scope: ``joint`` ranks all counted blocks together, ``block`` prunes each to the same share.
        training: stages of training; the search takes its settings from the first; none for the task's default.

    Example:
        >>> PEP(granularity="field_dim", start=-15.0, threshold_rate=1e-2, stop="published").trains
        True

    Reference:
        Liu et al., "Learnable embedding sizes for recommender systems" (PEP), 2021, equations 4-8. Departures: exact
        sizes; thresholds that start near the weights.
    """

    name: ClassVar[str] = "pep"
    trains: ClassVar[bool] = True

    granularity: Granularity = "feature_dim"
    start: float | None = None
    reach: float = 0.3
    threshold_rate: float | None = None
    threshold_decay: float = 1e-5
    search_epochs: int | None = None
    checks: int = 200
    stop: Literal["exact", "published"] = "exact"
    clip: float = 100.0
    head: HeadStart = "fresh"
    restart: ValueStart = "first"
    scope: RankingScope = "joint"
    training: tuple[Training, ...] = ()

    def __post_init__(self) -> None:
        check_search(self.start, self.reach, self.threshold_rate, self.threshold_decay, self.search_epochs, self.checks)
        if not 0 <= self.clip < math.inf:
            raise ConfigError(f"`clip` must be at least 0, but got clip={self.clip}.")

    def prepare(self, model: Model, data: Dataset, run: Run) -> PEPLadder:
        """Search once, for all budgets."""
        start, dense = initial_model(model, data, run)
        search = search_training(self.training, data.schema.task, self.search_epochs)
        steps = search.epochs * max(1, math.ceil(len(data.train) / search.batch_size))
        net = run.fit("search", start.with_table(self._soft(dense, steps)), data, search)
        found = net.table
        if not isinstance(found, SoftTable):
            raise ConfigError(f"The search must leave a soft table, but got {type(found).__name__}.")
        if self.restart == "found":
            start, dense = net, DenseTable(found.schema, found.blocks, found.base.detach())
        fill = np.zeros((data.schema.width, dense.width), np.float32)
        pruning = PruningLadder(dense, found.keys(), fill, data.counts, self.scope)
        return PEPLadder(pruning, found, self, start, data, run)

    def _soft(self, dense: DenseTable, steps: int) -> SoftTable:
        """The table to search in, for so many steps."""
        counted = counted_cells(dense.schema, dense.blocks)[torch.from_numpy(dense.schema.field_of_row)]
        first = first_threshold(dense.matrix.detach()[counted]) if self.start is None else self.start
        rule = Rule(self.threshold_rate or rising_rate(first, self.reach, steps), self.threshold_decay)
        return SoftTable(dense, self.granularity, first, rule, max(1, steps // self.checks), self.clip)


class SoftTable(ActiveTable):
    """``sign(e) relu(|e| - sigmoid(s))`` on counted blocks, ``e`` on the others.

    Args:
        dense: first values; copied.
        granularity: who shares a threshold.
        first: ``s`` at the start.
        rule: how ``s`` is updated.
        every: steps between two checks.
        clip: largest norm of the gradient; 0 does not clip.
    """

    lasting = True

    cells: Tensor
    fields: Tensor

    def __init__(
        self, dense: DenseTable, granularity: Granularity, first: float, rule: Rule, every: int, clip: float
    ) -> None:
        super().__init__()
        self.schema = dense.schema
        self.blocks = dense.blocks
        self.granularity: Granularity = granularity
        self.clip = clip
        self.rule = rule
        rows, width = dense.matrix.shape
        by_row = {"feature": rows, "feature_dim": rows, "field": self.schema.width, "field_dim": self.schema.width}
        by_column = granularity in ("dimension", "feature_dim", "field_dim")
        shape = (by_row.get(granularity, 1), width if by_column else 1)
        self.base = nn.Parameter(dense.matrix.detach().clone())
        self.threshold = nn.Parameter(torch.full(shape, first))
        self.register_buffer("fields", torch.from_numpy(self.schema.field_of_row.copy()).long())
        self.register_buffer("cells", counted_cells(self.schema, self.blocks))
        self.falls = Falls((rows, width), every)

    def extra_repr(self) -> str:
        """Settings of the search."""
        return f"{self.granularity}, every={self.falls.every}, clip={self.clip}, rule={self.rule}"

    def rules(self) -> Mapping[str, Rule]:
        """Thresholds have their own rate and decay."""
        return {"threshold": self.rule}

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self._shrink(self.base[ids], self._threshold(ids), self.fields[ids])

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self._shrink(self.base, self._threshold(slice(None)), self.fields)

    def _threshold(self, rows: Tensor | slice) -> Tensor:
        """``s`` of rows, in a shape that broadcasts to their vectors."""
        if self.granularity.startswith("feature"):
            return self.threshold[rows]
        return self.threshold[self.fields[rows]] if self.granularity.startswith("field") else self.threshold[0]

    def _shrink(self, vectors: Tensor, threshold: Tensor, fields: Tensor) -> Tensor:
        shrunk = shrink(vectors, threshold)
        return shrunk if bool(self.cells.all()) else torch.where(self.cells[fields], shrunk, vectors)

    def observe(self) -> None:
        """Note now and then what is below its threshold."""
        self.falls.observe(self.margins)

    def margins(self) -> Tensor:
        """``|e| - sigmoid(s)`` now, ``(n, D)``; infinite outside counted blocks."""
        margin = self.base.detach().abs() - self._threshold(slice(None)).detach().sigmoid()
        return torch.where(self.cells[self.fields], margin, torch.inf)

    def keys(self) -> NDArray[np.float32]:
        """Ranking keys ``(n, D)``: entries still above their threshold, then those that fell last; by margin."""
        return carry_uncounted(self.falls.keys(self.margins()), self.blocks)

    def alive(self) -> NDArray[np.int64]:
        """Counted entries above their threshold after 0, 1, ... checks."""
        return self.falls.alive(self.cells[self.fields])

    def _now(self) -> PrunedTable:
        """What it reads now, as a pruned table."""
        weight = self.weight().detach()
        fill = torch.zeros(self.schema.width, self.width)
        return PrunedTable(self.schema, self.blocks, weight, self.margins() > 0, fill, fill)

    def values(self) -> int:
        """Counted entries above their threshold."""
        return self._now().values()

    def stored(self) -> Tensor:
        """Rows with an entry above its threshold."""
        return self._now().stored()

    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """As the pruned table of what it reads now."""
        return self._now().pack(storage, rows, index)


@dataclass(frozen=True)
class PEPLadder(Ladder):
    """Masks of one search, each trained on its own.

    Args:
        pruning: the ranking of the search, over the values to start from.
        found: the table that the search left.
        method: settings.
        start: the model as the retraining starts.
        data: training and validation rows.
        run: keeps each retrained model.
    """

    pruning: PruningLadder
    found: SoftTable
    method: PEP
    start: Model
    data: Dataset
    run: Run

    def at_values(self, values: int) -> PrunedTable:
        """Exactly ``values`` entries, or those of the first check with at most so many.

        Raises:
            BudgetError: with ``stop="published"``, the search ended with more.
        """
        if self.method.stop == "published":
            alive = self.found.alive()
            reached = np.flatnonzero(alive <= values)
            if not len(reached):
                raise BudgetError(
                    f"The search ended with {alive[-1]:,} values above their threshold, more than the {values:,} asked "
                    "for; search longer, raise `threshold_rate`, or use stop='exact'.",
                    least_values=int(alive[-1]),
                )
            values = int(alive[reached[0]])
        return self.pruning.at_values(values)

    def at_bytes(
        self, size_bytes: int, storage: Storage, *, index: Index = "compact", vocabulary: bool = False
    ) -> PrunedTable:
        """See :class:`PruningLadder`; a linear weight goes with the last entry of its row."""
        return self.pruning.at_bytes(size_bytes, storage, index=index, vocabulary=vocabulary)

    def finish(self, model: Model) -> Model:
        """Train what is kept from its first values on."""
        if not isinstance(model.table, PrunedTable):
            raise ConfigError(f"Retraining needs a pruned table, but got {type(model.table).__name__}.")
        head = self.method.head if self.method.restart == "first" else "initial"
        return retrain(self.start, model.table, head, self.data, self.run, self.method.training)
