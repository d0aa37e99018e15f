"""Pruning by expected squared error, from the training counts alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.families.pruning import Fill, PruningLadder, RankingScope, fill_rows
from pocketrec.models.backbone import Model
from pocketrec.training.run import Run


@dataclass(frozen=True)
class FrequencyDistance(Method):
    """Keep the entries with the largest ``n_i (e_ij - c_fj)^2``: count times squared distance from the fill row.

    It is the squared error that replacing the entry adds, summed over the training rows, and needs no pass over them.

    Args:
        fill: What removed entries read: the frequency-weighted field mean (``codebook``), the ``plain`` mean, ``zero``.
        scope: ``joint`` ranks all counted blocks together, ``block`` prunes each to the same share.

    Example:
        >>> FrequencyDistance().fill
        'codebook'

    Reference:
        None: the baseline that needs no scoring pass; the sum over removed entries is the weighted k-means objective
        with one centre a field.
    """

    name: ClassVar[str] = "frequency_distance"

    fill: Fill = "codebook"
    scope: RankingScope = "joint"

    def prepare(self, model: Model, data: Dataset, run: Run) -> PruningLadder:
        """Rank by ``n_i (e_ij - c_fj)^2``."""
        weight = model.table.weight().detach().numpy()
        fill = fill_rows(self.fill, weight, data.schema, data.counts)
        scores = weight - fill[data.schema.field_of_row]
        np.square(scores, out=scores)
        scores *= data.counts.astype(np.float32)[:, None]
        return PruningLadder(model.table, scores, fill, data.counts, self.scope)
