"""Random pruning: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.families.pruning import Fill, PruningLadder, RankingScope, fill_rows
from pocketrec.models.backbone import Model
from pocketrec.randomness import generator
from pocketrec.training.run import Run


@dataclass(frozen=True)
class Random(Method):
    """Keep entries drawn uniformly: what any score has to beat.

    Args:
        fill: What removed entries read: ``zero``, the frequency-weighted field mean (``codebook``), the ``plain`` mean.
        scope: ``joint`` draws from all counted blocks together, ``block`` from each the same share.

    Example:
        >>> Random().fill
        'zero'

    Reference:
        None: the control of every comparison.
    """

    name: ClassVar[str] = "random"

    fill: Fill = "zero"
    scope: RankingScope = "joint"

    def prepare(self, model: Model, data: Dataset, run: Run) -> PruningLadder:
        """Rank by uniform draws from the run's seed."""
        weight = model.table.weight().detach().numpy()
        scores = generator(run.seed, "random pruning").random(weight.shape, dtype=np.float32)
        fill = fill_rows(self.fill, weight, data.schema, data.counts)
        return PruningLadder(model.table, scores, fill, data.counts, self.scope)
