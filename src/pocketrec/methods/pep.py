"""PEP: thresholds that are learned with the table decide which entries survive; these are trained again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from pocketrec.compression.ladder import Ladder
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError
from pocketrec.families.pruning import PruningLadder, RankingScope
from pocketrec.families.retraining import Retrain, Start, TrainingMethod, initial_model, retrain, search_training
from pocketrec.families.thresholds import Granularity, SoftTable, ThresholdSearch
from pocketrec.models.backbone import Model
from pocketrec.models.pruned import PrunedTable
from pocketrec.models.table import DenseTable, counted_cells
from pocketrec.packed import Index, Storage
from pocketrec.training.run import Run


@dataclass(frozen=True)
class PEP(TrainingMethod):
    """Learn a soft threshold with the table, keep what stays above it longest, and train that again from its start.

    In the search the table reads ``sign(e) relu(|e| - sigmoid(s))``. Coupled weight decay pulls ``s`` up from below by
    about one learning rate a step, whatever its size, so thresholds rise until every entry that the loss does not hold
    up is gone. One search serves all budgets: the ``B`` entries that stay longest survive, those of one check by their
    margin ``|e| - sigmoid(s)``. They start again from their first values, with the mask fixed.

    Args:
        granularity: who shares a threshold: everything (``global``), a column (``dimension``), a row (``feature``), a
            field, nobody (``feature_dim``), or a field and column.
        scope: ``joint`` ranks all counted blocks together, ``block`` prunes each to the same share.

    Example:
        >>> PEP(granularity="field_dim", search=ThresholdSearch(first=-15.0, rate=1e-2)).search.stop
        'exact'

    Reference:
        Liu et al., "Learnable embedding sizes for recommender systems" (PEP), 2021, equations 4-8. Departures: exact
        sizes; thresholds that start near the weights.
    """

    name: ClassVar[str] = "pep"

    granularity: Granularity = "feature_dim"
    search: ThresholdSearch = field(default=ThresholdSearch())
    retrain: Retrain = field(default=Retrain())
    scope: RankingScope = "joint"
    start: Start = field(default=Start())

    def prepare(self, model: Model, data: Dataset, run: Run) -> PEPLadder:
        """Search once, for all budgets."""
        start, dense = initial_model(model, data, run, self.start)
        search = search_training(run, data, self.search.epochs)
        net = run.fit("search", start.with_table(self._soft(dense, search.steps(len(data.train)))), data, search)
        found = net.table
        if not isinstance(found, SoftTable):
            raise ConfigError(f"The search must leave a soft table, but got {type(found).__name__}.")
        if self.retrain.values == "found":
            start, dense = net, DenseTable(found.schema, found.blocks, found.base.detach())
        fill = np.zeros((data.schema.width, dense.width), np.float32)
        pruning = PruningLadder(dense, found.keys(), fill, data.counts, self.scope)
        return PEPLadder(pruning, found, self, start, data, run)

    def _soft(self, dense: DenseTable, steps: int) -> SoftTable:
        """The table to search in, for so many steps."""
        counted = counted_cells(dense.schema, dense.blocks)[torch.from_numpy(dense.schema.field_of_row)]
        first = self.search.start(dense.matrix.detach()[counted])
        rule, every = self.search.rule(first, steps), self.search.every(steps)
        return SoftTable(dense, self.granularity, first, rule, every, self.search.clip)


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
        values = self.method.search.kept(self.found.alive(), values)
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
        how = self.method.retrain
        return retrain(self.start, model.table, how.head if how.values == "first" else "initial", self.data, self.run)
