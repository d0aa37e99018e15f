"""Random pruning: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pocketrec.data.dataset import Dataset
from pocketrec.families.pruning import Fill, RankingScope, ScoredMethod
from pocketrec.randomness import generator


@dataclass(frozen=True)
class Random(ScoredMethod):
    """Keep entries drawn uniformly: what any score has to beat.

    Example:
        >>> Random().fill
        'zero'

    Reference:
        None: the control of every comparison.
    """

    name: ClassVar[str] = "random"

    fill: Fill = "zero"
    scope: RankingScope = "joint"

    def scores(self, weight: NDArray[np.float32], fill: NDArray[np.float32], data: Dataset, seed: int) -> NDArray[Any]:
        """Uniform draws from the run's seed."""
        return generator(seed, "random pruning").random(weight.shape, dtype=np.float32)
