"""A click log that is made, not read: Zipf-distributed fields and a known teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pocketrec.data.source import BATCH_ROWS, Batch, Column, Scan, Source
from pocketrec.data.splits import scramble
from pocketrec.errors import ConfigError
from pocketrec.randomness import derive, generator

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Synthetic(Source):
    r"""Clicks of a factorisation machine whose every value, rare or frequent, has an effect of its own.

    Value ``v`` of a field with ``n`` values has ``P(v) = \int_{v+1}^{v+2} x^{-s} dx / \int_1^{n+1} x^{-s} dx`` with
    ``s = exponent``. Each value has an effect ``w`` and a latent vector ``u`` of ``rank`` components, all independent
    and uniform with mean 0 and variance 1, computed from (seed, field, value) alone. A row with values
    ``v_1 .. v_F`` is clicked with probability ``sigmoid(logit)``, where ``i = interaction``, ``r = rank`` and

        logit = bias + signal * (sqrt((1 - i) / F) sum_f w_f + sqrt(2 i / (r F (F - 1))) sum_{f<g} u_f . u_g).

    The two sums have variance 1 over the draw of the effects. The logit is stored with each row, so the best
    reachable AUC is known. Memory does not depend on rows or cardinalities.

    Args:
        rows: number of rows, at least 1.
        cardinalities: number of values of each field, at least 1 each.
        exponent: Zipf exponent, at least 0; 0 is uniform.
        signal: standard deviation of the logit, at least 0.
        interaction: share of the logit's variance that pairs of fields carry, in [0, 1].
        rank: components of a latent vector, at least 1.
        positives: approximate share of clicks, in (0, 1).
        hashed: make the values strings, which need a vocabulary, instead of dense integers.
        generator_seed: seed of values, teacher and clicks.

    Example:
        >>> scan = Synthetic(rows=10, cardinalities=(5, 3)).scan()
        >>> next(scan.batches).frame.columns
        ['f0', 'f1', 'label', 'teacher']
    """

    name: ClassVar[str] = "synthetic"
    generates: ClassVar[bool] = True

    rows: int = 300_000
    cardinalities: tuple[int, ...] = (20_000, 20_000, 10_000, 10_000, 5_000, 2_000, 1_000, 500, 100, 50, 20, 10)
    exponent: float = 1.0
    signal: float = 1.5
    interaction: float = 0.4
    rank: int = 4
    positives: float = 0.3
    hashed: bool = False
    generator_seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rank < 1 or not self.cardinalities or min(self.cardinalities) < 1:
            raise ConfigError(
                "`rows`, `rank` and every one of `cardinalities` must be at least 1, but got "
                f"rows={self.rows}, rank={self.rank}, cardinalities={self.cardinalities}."
            )
        if not (0 <= self.interaction <= 1 and 0 < self.positives < 1 and self.exponent >= 0 and self.signal >= 0):
            raise ConfigError(
                "Expected interaction in [0, 1], positives in (0, 1), exponent >= 0 and signal >= 0, but got "
                f"{self.interaction}, {self.positives}, {self.exponent}, {self.signal}."
            )

    def scan(self, path: Path | None = None, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`; ``path`` is not read."""
        made = tuple(
            Column(f"f{f}", "category") if self.hashed else Column(f"f{f}", "dense", n)
            for f, n in enumerate(self.cardinalities)
        )
        return Scan(made, self._batches(), label="label", teacher="teacher")

    def _batches(self) -> Iterator[Batch]:
        for first in range(0, self.rows, BATCH_ROWS):
            size = min(BATCH_ROWS, self.rows - first)
            noise = generator(self.generator_seed, "synthetic rows", first)
            values = np.stack([zipf(noise.random(size), n, self.exponent) for n in self.cardinalities], axis=1)
            logits = self.teacher(values)
            clicks = noise.random(size) < 1 / (1 + np.exp(-logits))
            frame = pl.DataFrame({f"f{f}": values[:, f] for f in range(values.shape[1])})
            if self.hashed:
                frame = frame.cast(pl.String)
            label, teacher = clicks.astype(np.int8), logits.astype(np.float32)
            yield Batch(
                frame.with_columns(label=pl.Series(label), teacher=pl.Series(teacher)),
                np.arange(first + 1, first + size + 1),
            )

    def teacher(self, values: NDArray[np.int64]) -> NDArray[np.float64]:
        """Logits ``(B,)`` of rows of values ``(B, F)``."""
        fields = values.shape[1]
        effects = sum(self._draw(f, values[:, f], 0) for f in range(fields))
        pairs = np.zeros(len(values))
        for k in range(1, self.rank + 1):
            latent = np.stack([self._draw(f, values[:, f], k) for f in range(fields)], axis=1)
            pairs += (latent.sum(1) ** 2 - (latent**2).sum(1)) / 2
        pairs /= math.sqrt(max(1, self.rank * fields * (fields - 1) / 2))
        share = self.interaction if fields > 1 else 0.0
        total = math.sqrt((1 - share) / fields) * effects + math.sqrt(share) * pairs
        return self._bias() + self.signal * total

    def _bias(self) -> float:
        """The intercept at which a normal logit gives about ``positives`` clicks (probit approximation)."""
        return math.log(self.positives / (1 - self.positives)) * math.sqrt(1 + math.pi * self.signal**2 / 8)

    def _draw(self, field: int, values: NDArray[np.int64], component: int) -> NDArray[np.float64]:
        """A number per value, uniform with mean 0 and variance 1, from (seed, field, component, value) alone."""
        key = np.uint64(derive(self.generator_seed, "synthetic teacher", field, component))
        bits = scramble((values.astype(np.uint64) * _GOLDEN) ^ key)
        return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1) * math.sqrt(3)


def zipf(uniform: NDArray[np.float64], cardinality: int, exponent: float) -> NDArray[np.int64]:
    """Values in ``[0, cardinality)`` from uniforms in [0, 1), by the inverse of the distribution function."""
    if exponent == 1:
        position = (cardinality + 1.0) ** uniform
    else:
        power = 1 - exponent
        position = (1 + uniform * ((cardinality + 1.0) ** power - 1)) ** (1 / power)
    return np.clip(position.astype(np.int64) - 1, 0, cardinality - 1)
