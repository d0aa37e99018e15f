"""Magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pocketrec.families.pruning import Dataset, Floats, ScoredMethod
from pocketrec.families.sharing import BlockSharing


@dataclass(frozen=True)
class MagPrune(ScoredMethod):
    """Keep the entries of largest magnitude; the others read zero. Nothing is trained, no data is read.

    Needs a table that was trained with an L2 penalty, so that magnitude means importance.

    Example:
        >>> MagPrune(n_min=1).scope
        'joint'

    Reference:
        Han et al., "Learning both weights and connections", 2015; as a baseline for embeddings: Tran et al., "A
        thorough performance benchmarking on lightweight embedding-based recommender systems", 2024, Tables 5 and 6.
    """

    name: ClassVar[str] = "mag_prune"

    scope: BlockSharing = "joint"
    n_min: int = 0

    def scores(self, weight: Floats, fill: Floats, data: Dataset, seed: int) -> Floats:
        """``|e|``."""
        return np.abs(weight)
