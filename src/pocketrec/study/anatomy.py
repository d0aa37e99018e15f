"""What a trained table looks like: how the magnitude of a row goes with how often it occurs.

Magnitude pruning takes it for granted that magnitude means importance; where frequent rows are large, it is a frequency
ranking in disguise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pocketrec.models.table import Block


def anatomy(weight: NDArray[np.float32], counts: NDArray[np.int64], blocks: tuple[Block, ...]) -> list[dict[str, Any]]:
    """Per counted block: mean magnitude of rows by how often they occur, and Spearman's correlation of the two.

    Args:
        weight: the table, ``(n, D)``.
        counts: training occurrences of its rows, ``(n,)``.
        blocks: how it is tiled.

    Returns:
        Of each block its name, ``spearman`` in [-1, 1] (``None`` where all are equal), and ``bins``: rows that occur
        ``low`` to ``high`` times, with the mean, 10th and 90th percentile of ``mean_j |e_ij|``. Bins double in width.

    Example:
        >>> found = anatomy(np.eye(3, dtype=np.float32) * [1, 2, 3], np.array([1, 2, 9]), (Block("all", 0, 3, 0, 3),))
        >>> found[0]["spearman"], [b["low"] for b in found[0]["bins"]]
        (1.0, [1, 2, 8])

    Reference:
        "A thorough performance benchmarking on lightweight embedding-based recommender systems", 2024, Figure 2.
    """
    return [_block(b, weight, counts) for b in blocks if b.counted]


def _block(block: Block, weight: NDArray[np.float32], counts: NDArray[np.int64]) -> dict[str, Any]:
    rows = slice(block.start, block.stop)
    magnitude = np.abs(weight[rows, block.left : block.right]).mean(axis=1, dtype=np.float64)
    often = counts[rows]
    found = pl.select(pl.corr(pl.Series(often), pl.Series(magnitude), method="spearman")).item()
    spearman = round(float(found), 12) if found is not None and np.isfinite(found) else None
    doubling = np.where(often > 0, np.floor(np.log2(np.maximum(often, 1))).astype(np.int64), -1)
    bins = []
    for power in np.unique(doubling).tolist():
        inside = magnitude[doubling == power]
        low, high = (0, 0) if power < 0 else (2**power, 2 ** (power + 1) - 1)
        p10, p90 = np.quantile(inside, (0.1, 0.9)).tolist()
        bins.append(
            {"low": low, "high": high, "rows": len(inside), "mean": float(inside.mean()), "p10": p10, "p90": p90}
        )
    return {"block": block.name, "spearman": spearman, "bins": bins}
