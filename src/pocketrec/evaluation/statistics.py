"""How sure a figure is: hierarchical bootstrap over seeds and rows, paired t intervals, ranks, families of comparisons.

Differences are always paired: every name sees the same resampled seeds and the same resampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketrec.errors import ConfigError, DataError
from pocketrec.randomness import generator

Weights = NDArray[np.float64]
"""How often each row is drawn: whole numbers, as floats, so that products with figures need no conversion."""

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

    def no_worse(self, margin: float) -> bool:
        """Whether the whole interval of a difference lies above ``-margin``: non-inferiority.

        At ``level=0.95`` this is a one-sided test at 2.5 %, at 0.9 one at 5 %.
        """
        return self.low > -margin

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
    ones = [np.ones(n) for n in sizes]
    estimates = {
        name: float(np.mean([f(w) for f, w in zip(by_seed, ones, strict=True)])) for name, by_seed in statistics.items()
    }
    return Bootstrap(estimates, drawn)


def auc_statistic(labels: ArrayLike, scores: ArrayLike, *, exact: bool = True) -> Statistic:
    """Weighted AUC as a function of row weights, sorted once: ``O(n)`` per replicate.

    With negatives in order of score and ``C`` the running sum of their weights, a positive ``i`` of weight ``w_i``
    that beats ``a_i`` negatives and ties with up to ``b_i`` of them adds ``w_i (C[a_i] + C[b_i]) / 2``.

    Args:
        labels: ``(n,)``, 0 or 1.
        scores: ``(n,)``.
        exact: count pairs; else the first-order form ``AUC + sum_i w_i (V_i - AUC) / n_i``, where ``V_i`` is the share
            of the other class that row ``i`` is ordered with rightly, and ``n_i`` the size of its own class: off by
            ``O(1/n)``, and one product of vectors per replicate.

    Raises:
        DataError: only one class is present, or the shapes differ.

    Reference:
        DeLong, DeLong and Clarke-Pearson, Biometrics 1988 (structural components ``V``).
    """
    truth, values = np.asarray(labels) == 1, np.asarray(scores)
    if truth.shape != values.shape or truth.all() or not truth.any():
        raise DataError("An AUC needs labels and scores of one shape (n,) with both classes present.")
    order = np.argsort(values, kind="stable")
    positive, negative = order[truth[order]], order[~truth[order]]
    below = np.searchsorted(values[negative], values[positive], side="left")
    upto = np.searchsorted(values[negative], values[positive], side="right")
    if not exact:
        return _linear_auc(positive, (below + upto) / (2 * len(negative)), negative, values)

    def weighted(weights: Weights) -> float:
        running = np.zeros(len(negative) + 1)
        np.cumsum(weights[negative], out=running[1:])
        w = weights[positive]
        pairs = int(w.sum()) * int(running[-1])
        return int((w * (running[below] + running[upto])).sum()) / (2 * pairs) if pairs else math.nan

    return weighted


def _linear_auc(
    positive: NDArray[np.int64], placed: NDArray[np.float64], negative: NDArray[np.int64], values: NDArray[Any]
) -> Statistic:
    """The first-order form from the placements of the positives among the negatives."""
    ranked = values[positive]
    above = np.searchsorted(ranked, values[negative], side="right")
    upto = np.searchsorted(ranked, values[negative], side="left")
    area = float(placed.mean())
    influence = np.empty(len(values))
    influence[positive] = (placed - area) / len(positive)
    influence[negative] = (1 - (above + upto) / (2 * len(positive)) - area) / len(negative)
    return lambda weights: area + float(weights @ influence)


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


def holm(evidence: ArrayLike) -> NDArray[np.float64]:
    """Holm's correction of ``m`` p-values ``(m,)``: in rising order, ``max_{j<=i} min(1, (m - j + 1) p_(j))``.

    Rejecting where the corrected value is at most ``a`` keeps the chance of any false rejection at most ``a``, however
    the comparisons depend on each other.

    Example:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]

    Reference:
        Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.
    """
    p = np.asarray(evidence, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return corrected


def retained(figure: float, original: float, chance: float = 0.0) -> float:
    """Share of the original's quality that is kept: ``(figure - chance) / (original - chance)``.

    An AUC of 0.5 is chance, so its plain ratio (``chance=0``) cannot fall below ``0.5 / original``.
    """
    return (figure - chance) / (original - chance) if original != chance else math.nan


@dataclass(frozen=True)
class Ranks:
    """Average ranks of ``k`` methods over ``n`` data sets, 1 the best, and whether they differ.

    Attributes:
        average: by method.
        statistic: Friedman's chi-square, corrected for ties.
        p: evidence against "all methods rank alike", by the chi-square distribution with ``k - 1`` degrees of freedom.
        critical: Nemenyi's difference of average ranks above which two methods differ.
        blocks: number of data sets.
    """

    average: Mapping[str, float]
    statistic: float
    p: float
    critical: float
    blocks: int


def ranks(figures: Mapping[str, Sequence[float]], level: float = 0.95) -> Ranks:
    """Rank methods on each data set, higher figures first, ties sharing their ranks, and test the averages.

    ``chi2 = 12 n / (k (k + 1)) sum_j (R_j - (k + 1) / 2)^2 / (1 - ties)``; ``critical = q sqrt(k (k + 1) / (6 n))``
    with ``sqrt(2) q`` the quantile of the range of ``k`` standard normals.

    Args:
        figures: per method, one figure for each data set, all of the same data sets.
        level: of the critical difference, in (0, 1).

    Raises:
        DataError: fewer than two methods, or unequal numbers of data sets.

    Example:
        >>> ranks({"a": [0.9, 0.8], "b": [0.7, 0.6], "c": [0.7, 0.5]}).average
        {'a': 1.0, 'b': 2.25, 'c': 2.75}

    Reference:
        Demsar, Statistical comparisons of classifiers over multiple data sets, JMLR 2006, section 3.2.2.
    """
    sizes = {len(v) for v in figures.values()}
    if len(figures) < 2 or len(sizes) > 1 or 0 in sizes:
        raise DataError(
            f"Ranks need at least two methods on the same data sets, but got {len(figures)} on {sorted(sizes)}."
        )
    values = -np.array(list(figures.values()), dtype=np.float64).T
    n, k = values.shape
    below = (values[:, None, :] < values[:, :, None]).sum(axis=2)
    equal = (values[:, None, :] == values[:, :, None]).sum(axis=2)
    average = (below + (equal + 1) / 2).mean(axis=0)
    ties = float((equal**2 - 1).sum()) / (n * k * (k * k - 1))
    spread = float(((average - (k + 1) / 2) ** 2).sum())
    statistic = 12 * n / (k * (k + 1)) * spread / (1 - ties) if ties < 1 else 0.0
    critical = range_quantile(level, k) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
    by_name = {name: float(r) for name, r in zip(figures, average, strict=True)}
    return Ranks(by_name, statistic, 1 - chi_square_cdf(statistic, k - 1), critical, n)


def chi_square_cdf(value: float, freedom: int) -> float:
    """Distribution function of chi-square: ``x^a e^-x sum_i x^i / Gamma(a + i + 1)``, ``x`` and ``a`` the halves."""
    x, a = value / 2, freedom / 2
    if x <= 0:
        return 0.0
    term = math.exp(a * math.log(x) - x - math.lgamma(a + 1))
    total, i = term, 0
    while term > 1e-17 * total or i < x:
        i += 1
        term *= x / (a + i)
        total += term
    return min(1.0, total)


def range_cdf(width: float, size: int) -> float:
    """Chance that ``k`` standard normals lie within a width ``w``: ``k int phi(z) (Phi(z) - Phi(z - w))^(k-1) dz``."""
    nodes, node_weights = _quadrature()
    z = 9.0 * nodes
    phi = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    inside = np.array([math.erf(v / math.sqrt(2)) - math.erf((v - width) / math.sqrt(2)) for v in z]) / 2
    return size * 9.0 * float(node_weights @ (phi * inside ** (size - 1)))


@lru_cache
def range_quantile(probability: float, size: int) -> float:
    """Inverse of :func:`range_cdf`: the quantile of the studentised range with infinite degrees of freedom."""
    return _inverse(lambda width: range_cdf(width, size), probability)


def student_cdf(t: float, freedom: int) -> float:
    """Distribution function of Student's t: ``1/2 + c int_0^{atan(t / sqrt(v))} cos(a)^(v-1) da``."""
    nodes, node_weights = _quadrature()
    limit = math.atan(t / math.sqrt(freedom))
    integral = limit / 2 * float(node_weights @ np.cos(limit / 2 * (nodes + 1)) ** (freedom - 1))
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + constant * integral


@lru_cache
def student_quantile(probability: float, freedom: int) -> float:
    """Inverse of :func:`student_cdf` for probabilities in [0.5, 1), by bisection."""
    return _inverse(lambda t: student_cdf(t, freedom), probability)


@lru_cache
def _quadrature() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nodes and weights of Gauss and Legendre on [-1, 1]."""
    return np.polynomial.legendre.leggauss(128)


def _inverse(cdf: Callable[[float], float], probability: float) -> float:
    """Where a rising function of positive numbers reaches ``probability``, by bisection."""
    low, high = 0.0, 1.0
    while cdf(high) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle) < probability else (low, middle)
    return (low + high) / 2


def _row_weights(rng: np.random.Generator, rows: int) -> Weights:
    """How often each of ``rows`` rows appears among ``rows`` draws with replacement."""
    return np.bincount(rng.integers(0, rows, rows), minlength=rows).astype(np.float64)


def _percentile(estimate: float, drawn: NDArray[np.float64], level: float) -> Interval:
    """Percentile interval; ``p`` is twice the smaller share of draws on either side of zero, the data counted as one.

    Counted so, ``p`` is never 0, and 100 draws cannot look like more evidence than 1 in 50.
    """
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    p = min(1.0, 2 * (1 + min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))) / (1 + len(drawn)))
    return Interval(estimate, float(low), float(high), p, level)


def _check_seeds(statistics: Mapping[str, Sequence[Statistic]], sizes: Sequence[int], shared_rows: bool) -> None:
    for name, by_seed in statistics.items():
        if len(by_seed) != len(sizes) or not sizes:
            raise ConfigError(f"{name!r} must have one statistic per seed, {len(sizes)}, but has {len(by_seed)}.")
    if shared_rows and len(set(sizes)) > 1:
        raise ConfigError(f"`shared_rows` needs one test split, but the seeds have {sorted(set(sizes))} rows.")
