"""Pruning by expected squared error, from the training counts alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pocketrec.families.pruning import Dataset, Fill, Floats, ScoredMethod
from pocketrec.families.sharing import BlockSharing


@dataclass(frozen=True)
class FrequencyDistance(ScoredMethod):
    """Keep the entries with the largest ``n_i (e_ij - c_fj)^2``: count times squared distance from the fill row.

    It is the squared error that replacing the entry adds, summed over the training rows, and needs no pass over them.

    Example:
        >>> FrequencyDistance().fill
        'codebook'

    Reference:
        None: the baseline that needs no scoring pass; the sum over removed entries is the weighted k-means objective
        with one centre a field.
    """

    name: ClassVar[str] = "frequency_distance"

    fill: Fill = "codebook"
    scope: BlockSharing = "joint"

    def scores(self, weight: Floats, fill: Floats, data: Dataset, seed: int) -> Floats:
        """``n_i (e_ij - c_fj)^2``."""
        scores = weight - fill[data.schema.field_of_row]
        np.square(scores, out=scores)
        scores *= data.counts.astype(np.float32)[:, None]
        return scores
