"""Random pruning: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pocketrec.families.pruning import Dataset, Fill, Floats, ScoredMethod
from pocketrec.families.sharing import BlockSharing
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
    scope: BlockSharing = "joint"

    def scores(self, weight: Floats, fill: Floats, data: Dataset, seed: int) -> Floats:
        """Uniform draws from the run's seed."""
        return generator(seed, "random pruning").random(weight.shape, dtype=np.float32)
