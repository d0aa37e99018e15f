"""How sure a figure is: hierarchical bootstrap over seeds and rows, paired t intervals, equivalence.

Differences are always paired: every name sees the same resampled seeds and the same resampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketrec.errors import ConfigError, DataError
from pocketrec.randomness import generator

Weights = NDArray[np.int64]
Statistic = Callable[[Weights], float]
"""Row weights ``(n,)`` -> the figure on the resampled rows; all ones give the figure itself."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval of coverage ``level`` and the two-sided share ``p`` of evidence against zero."""

    estimate: float
    low: float
    high: float
    p: float
    level: float

    def within(self, margin: float) -> bool:
        """Whether the whole interval lies in ``(-margin, margin)``: equivalence.

        At ``level=0.9`` this is the two one-sided tests procedure (TOST) at 5 %; at 0.95 it is stricter.
        """
        return -margin < self.low and self.high < margin

    def __str__(self) -> str:
        return f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Bootstrap:
    """Figures by name, and their bootstrap replicates ``(R,)``, which share one set of draws."""

    estimates: Mapping[str, float]
    replicates: Mapping[str, NDArray[np.float64]]

    def mean(self, name: str, level: float = 0.95) -> Interval:
        """Percentile interval of one figure."""
        return _percentile(self.estimates[name], self.replicates[name], level)

    def difference(self, name: str, other: str, level: float = 0.95) -> Interval:
        """Percentile interval of ``name - other``, paired draw by draw."""
        estimate = self.estimates[name] - self.estimates[other]
        return _percentile(estimate, self.replicates[name] - self.replicates[other], level)


def bootstrap(
    statistics: Mapping[str, Sequence[Statistic]],
    sizes: Sequence[int],
    *,
    replicates: int = 1000,
    seed: int = 0,
    shared_rows: bool = False,
) -> Bootstrap:
    """Hierarchical bootstrap of means over seeds: draw seeds with replacement, then rows within each drawn seed.

    ``statistics[name][s]`` gives the figure of seed ``s`` from the weights of its ``sizes[s]`` rows. The percentile
    interval over few seeds is somewhat narrow where seeds differ much and wide where rows make the noise.

    Args:
        statistics: per name, one statistic per seed, see :func:`auc_statistic` and :func:`mean_statistic`.
        sizes: rows (or users) of each seed's test split.
        replicates: number of draws ``R``.
        seed: seed of the draws.
        shared_rows: the seeds share one test split, so one draw of rows serves all of them.

    Raises:
        ConfigError: the numbers of seeds or rows do not fit together.

    Example:
        >>> a, b = np.arange(50.0), np.arange(50.0) - 1
        >>> result = bootstrap({"a": [mean_statistic(a)], "b": [mean_statistic(b)]}, [50], replicates=200)
        >>> str(result.difference("a", "b"))
        '+1.0000 [+1.0000, +1.0000]'
    """
    _check_seeds(statistics, sizes, shared_rows)
    rng = generator(seed, "bootstrap")
    drawn = {name: np.empty(replicates) for name in statistics}
    for r in range(replicates):
        picks = rng.integers(0, len(sizes), len(sizes))
        shared = _row_weights(rng, sizes[0]) if shared_rows else None
        weights = [shared if shared is not None else _row_weights(rng, sizes[s]) for s in picks]
        for name, by_seed in statistics.items():
            drawn[name][r] = np.mean([by_seed[s](w) for s, w in zip(picks, weights, strict=True)])
    ones = [np.ones(n, dtype=np.int64) for n in sizes]
    estimates = {
        name: float(np.mean([f(w) for f, w in zip(by_seed, ones, strict=True)])) for name, by_seed in statistics.items()
    }
    return Bootstrap(estimates, drawn)


def auc_statistic(labels: ArrayLike, scores: ArrayLike) -> Statistic:
    """Weighted AUC as a function of row weights, sorted once: ``O(n)`` per replicate.

    With negatives in order of score and ``C`` the running sum of their weights, a positive ``i`` of weight ``w_i``
    that beats ``a_i`` negatives and ties with up to ``b_i`` of them adds ``w_i (C[a_i] + C[b_i]) / 2``.

    Args:
        labels: ``(n,)``, 0 or 1.
        scores: ``(n,)``.

    Raises:
        DataError: only one class is present, or the shapes differ.
    """
    truth, values = np.asarray(labels) == 1, np.asarray(scores)
    if truth.shape != values.shape or truth.all() or not truth.any():
        raise DataError("An AUC needs labels and scores of one shape (n,) with both classes present.")
    order = np.argsort(values, kind="stable")
    positive, negative = order[truth[order]], order[~truth[order]]
    below = np.searchsorted(values[negative], values[positive], side="left")
    upto = np.searchsorted(values[negative], values[positive], side="right")

    def weighted(weights: Weights) -> float:
        running = np.zeros(len(negative) + 1, dtype=np.int64)
        np.cumsum(weights[negative], out=running[1:])
        w = weights[positive]
        pairs = int(w.sum()) * int(running[-1])
        return int((w * (running[below] + running[upto])).sum()) / (2 * pairs) if pairs else math.nan

    return weighted


def mean_statistic(values: ArrayLike) -> Statistic:
    """Weighted mean of per-row or per-user figures ``(n,)``, for instance NDCG."""
    figures = np.asarray(values, dtype=np.float64)
    return lambda weights: float(weights @ figures / weights.sum())


def paired_t(figures: ArrayLike, others: ArrayLike, level: float = 0.95) -> Interval:
    """Student interval of the mean paired difference over seeds: ``mean(d) +- t_{n-1} sd(d) / sqrt(n)``.

    Args:
        figures: ``(n,)``, one figure per seed, at least two.
        others: ``(n,)``, the other variant on the same seeds.
        level: coverage, in (0, 1).

    Raises:
        DataError: fewer than two pairs, or unequal numbers of them.
    """
    a, b = np.asarray(figures, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise DataError(f"A paired interval needs two equal lists of at least 2 seeds, but got {a.shape}, {b.shape}.")
    estimate = float((a - b).mean())
    error = float((a - b).std(ddof=1)) / math.sqrt(len(a))
    if error == 0:
        return Interval(estimate, estimate, estimate, float(estimate == 0), level)
    half = student_quantile((1 + level) / 2, len(a) - 1) * error
    p = 2 * (1 - student_cdf(abs(estimate) / error, len(a) - 1))
    return Interval(estimate, estimate - half, estimate + half, p, level)


def student_cdf(t: float, freedom: int) -> float:
    """Distribution function of Student's t: ``1/2 + c int_0^{atan(t / sqrt(v))} cos(a)^(v-1) da``."""
    nodes, node_weights = np.polynomial.legendre.leggauss(128)
    limit = math.atan(t / math.sqrt(freedom))
    integral = limit / 2 * float(node_weights @ np.cos(limit / 2 * (nodes + 1)) ** (freedom - 1))
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + constant * integral


def student_quantile(probability: float, freedom: int) -> float:
    """Inverse of :func:`student_cdf` for probabilities in [0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _row_weights(rng: np.random.Generator, rows: int) -> Weights:
    """How often each of ``rows`` rows appears among ``rows`` draws with replacement."""
    return np.bincount(rng.integers(0, rows, rows), minlength=rows)


def _percentile(estimate: float, drawn: NDArray[np.float64], level: float) -> Interval:
    """Percentile interval; ``p`` is twice the smaller share of draws on either side of zero."""
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    p = min(1.0, 2 * min(float((drawn <= 0).mean()), float((drawn >= 0).mean())))
    return Interval(estimate, float(low), float(high), p, level)


def _check_seeds(statistics: Mapping[str, Sequence[Statistic]], sizes: Sequence[int], shared_rows: bool) -> None:
    for name, by_seed in statistics.items():
        if len(by_seed) != len(sizes) or not sizes:
            raise ConfigError(f"{name!r} must have one statistic per seed, {len(sizes)}, but has {len(by_seed)}.")
    if shared_rows and len(set(sizes)) > 1:
        raise ConfigError(f"`shared_rows` needs one test split, but the seeds have {sorted(set(sizes))} rows.")
