"""Magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.families.pruning import PruningLadder, RankingScope, fill_rows
from pocketrec.models.backbone import Model
from pocketrec.training.run import Run


@dataclass(frozen=True)
class MagPrune(Method):
    """Keep the entries of largest magnitude; the others read zero. Nothing is trained, no data is read.

    Needs a table that was trained with an L2 penalty, so that magnitude means importance.

    Args:
        scope: ``joint`` ranks all counted blocks together, ``block`` prunes each to the same share.
        n_min: Entries that each row keeps at least, ``0 <= n_min <= floor(d (1 - sparsity))``.

    Example:
        >>> MagPrune(n_min=1).scope
        'joint'

    Reference:
        Han et al., "Learning both weights and connections", 2015; as a baseline for embeddings: Tran et al., "A
        thorough performance benchmarking on lightweight embedding-based recommender systems", 2024, Tables 5 and 6.
    """

    name: ClassVar[str] = "mag_prune"

    scope: RankingScope = "joint"
    n_min: int = 0

    def prepare(self, model: Model, data: Dataset, run: Run) -> PruningLadder:
        """Rank by ``|e|``."""
        weight = model.table.weight().detach().numpy()
        fill = fill_rows("zero", weight, data.schema, data.counts)
        return PruningLadder(model.table, np.abs(weight), fill, data.counts, self.scope, self.n_min)
