"""PEP: thresholds that are learned with the table decide which entries survive; these are trained again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from pocketrec.compression.ladder import Finished, Model, Room, Run
from pocketrec.families.pruning import Dataset, PrunedTable, PruningLadder
from pocketrec.families.retraining import Retrain, Start, TrainingMethod, initial_model, retrain, search_training
from pocketrec.families.sharing import BlockSharing, ThresholdSharing
from pocketrec.families.thresholds import SoftTable, ThresholdSearch
from pocketrec.models.table import DenseTable, counted_cells


@dataclass(frozen=True)
class PEP(TrainingMethod):
    """Learn a soft threshold with the table, keep what stays above it longest, and train that again from its start.

    In the search the table reads ``sign(e) relu(|e| - sigmoid(s))``. Coupled weight decay pulls ``s`` up from below by
    about one learning rate a step, whatever its size, so thresholds rise until every entry that the loss does not hold
    up is gone. One search serves all budgets: the ``B`` entries that stay longest survive, those of one check by their
    margin ``|e| - sigmoid(s)``. They start again from their first values, with the mask fixed.

    Args:
        granularity: who shares a threshold: everything (``joint``), a ``column``, a ``row``, a ``field``, a column
            within a field (``field_column``), or nobody (``cell``).
        scope: ``joint`` ranks all counted blocks together, ``block`` prunes each to the same share.

    Example:
        >>> PEP(granularity="field_column", search=ThresholdSearch(first=-15.0, rate=1e-2)).search.stop
        'exact'

    Reference:
        Liu et al., "Learnable embedding sizes for recommender systems" (PEP), 2021, equations 4-8. Departures: exact
        sizes; thresholds that start near the weights.
    """

    name: ClassVar[str] = "pep"

    granularity: ThresholdSharing = "cell"
    search: ThresholdSearch = field(default=ThresholdSearch())
    retrain: Retrain = field(default=Retrain())
    scope: BlockSharing = "joint"
    start: Start = field(default=Start())

    def prepare(self, model: Model, data: Dataset, run: Run) -> Finished:
        """Search once, for all budgets."""
        start, dense = initial_model(model, data, run, self.start)
        net, found = self.searched(start, dense, data, run)
        if self.retrain.values == "found":
            start, dense = net, DenseTable(found.schema, found.blocks, found.base.detach())
        fill = np.zeros((data.schema.width, dense.width), np.float32)
        ladder = CheckedLadder(
            dense, found.keys(), fill, data.counts, self.scope, search=self.search, alive=found.alive()
        )
        head = self.retrain.head if self.retrain.values == "first" else "initial"
        return Finished(ladder, lambda draft, room: retrain(start, draft.table, head, data, run))

    def searched(self, start: Model, dense: DenseTable, data: Dataset, run: Run) -> tuple[Model[SoftTable], SoftTable]:
        """The model after the search from ``dense`` on, and its table; the run keeps it."""
        training = search_training(run, data, self.search.epochs)
        soft = self._soft(dense, training.steps(len(data.train)))
        net = run.fit("search", start.with_table(soft), data, training)
        return net, net.table

    def _soft(self, dense: DenseTable, steps: int) -> SoftTable:
        """The table to search in, for so many steps."""
        counted = counted_cells(dense.schema, dense.blocks)[torch.from_numpy(dense.schema.field_of_row)]
        first = self.search.start(dense.matrix.detach()[counted])
        rule, every = self.search.rule(first, steps), self.search.every(steps)
        return SoftTable(dense, self.granularity, first, rule, every, self.search.clip)


@dataclass(frozen=True)
class CheckedLadder(PruningLadder):
    """The ranking of a search that may end at one of its checks, where the budget is in values.

    Args:
        search: says where it ends.
        alive: values above their threshold after 0, 1, ... checks.
    """

    search: ThresholdSearch = field(kw_only=True)
    alive: NDArray[np.int64] = field(kw_only=True)

    def table(self, room: Room) -> PrunedTable:
        """Exactly as many entries as fit, or those of the first check with at most so many values.

        Raises:
            BudgetError: with ``stop="published"``, the search ended with more.
        """
        if room.values is None:
            return super().table(room)
        return super().table(replace(room, values=self.search.kept(self.alive, room.values)))
