"""Shapley values of table entries over all samples, resumable and in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pocketrec.attribution.estimators import Estimator, Stream
from pocketrec.attribution.games import Game
from pocketrec.attribution.samples import SampleBatch, Samples
from pocketrec.errors import ConfigError, DivergedError
from pocketrec.files import boundary
from pocketrec.training.steps import Checkpoint

AUDIT_EVERY = 16


@dataclass(frozen=True)
class Scores:
    """Mean and mean square over all samples of each entry's Shapley value: two tables ``(n, D)``, float32.

    ``explained`` and ``drop`` are, on the audited batches, the mean sum of values and the mean of
    ``loss(empty) - loss(full)``; they are equal for an estimator without bias.
    """

    mean: NDArray[np.float32]
    square: NDArray[np.float32]
    samples: int
    explained: float
    drop: float

    @property
    def gap(self) -> float:
        """Efficiency gap: the relative error of the sum of all values."""
        return (self.explained - self.drop) / abs(self.drop) if self.drop else 0.0

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a run stores."""
        return {
            "mean": self.mean,
            "square": self.square,
            "samples": np.array([self.samples]),
            "audit": np.array([self.explained, self.drop]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Scores:
        """Read what ``arrays`` wrote."""
        explained, drop = (float(x) for x in arrays["audit"])
        return cls(arrays["mean"], arrays["square"], int(arrays["samples"][0]), explained, drop)


class ScoreSums:
    """Running sums of a scoring run: two score tables and a few scalars; can be stored and taken up again."""

    def __init__(self, shape: tuple[int, int], checkpoint: Checkpoint | None) -> None:
        self.checkpoint = checkpoint
        stored = checkpoint.load() if checkpoint is not None else None
        if stored is None:
            self.total, self.square = torch.zeros(shape), torch.zeros(shape)
            self.audit, self.samples = np.zeros(3), 0
        else:
            self.total, self.square = (torch.from_numpy(np.array(stored[k])) for k in ("total", "square"))
            self.audit, self.samples = np.array(stored["audit"]), int(stored["samples"][0])

    def include(self, sums: Mapping[str, NDArray[Any]]) -> None:
        """Add the sums of other samples."""
        self.total += torch.from_numpy(np.array(sums["total"]))
        self.square += torch.from_numpy(np.array(sums["square"]))
        self.audit += sums["audit"]
        self.samples += int(sums["samples"][0])

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Scatter one batch: ``rows (B, P)``, ``values (B, P, D)``."""
        flat = values.reshape(-1, values.shape[-1])
        if not torch.isfinite(flat.sum()):
            raise DivergedError(f"Shapley values must be finite, but are not in the batch at sample {self.samples}.")
        self.total.index_add_(0, rows.reshape(-1), flat)
        self.square.index_add_(0, rows.reshape(-1), flat.square_())
        self.samples += len(rows)

    def add_table(self, values: Tensor) -> None:
        """One game whose players are all entries: ``values (n, D)``."""
        if not torch.isfinite(values.sum()):
            raise DivergedError(f"Shapley values must be finite, but are not in game {self.samples}.")
        self.total += values
        self.square += values.square_()
        self.samples += 1

    def save(self) -> None:
        """Store the state if it is time to."""
        boundary("step")
        if self.checkpoint is None or not self.checkpoint.due():
            return
        self.checkpoint.save(self.arrays())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The sums."""
        return {
            "total": self.total.numpy(),
            "square": self.square.numpy(),
            "audit": self.audit,
            "samples": np.array([self.samples]),
        }

    def converged(self, tolerance: float) -> bool:
        """The published stop rule: largest standard error below ``tolerance`` times the range of the means."""
        mean = self.total / self.samples
        variance = (self.square / self.samples - mean.square()).clamp_min_(0) / self.samples
        return bool(variance.max().sqrt() < tolerance * (mean.max() - mean.min()))

    def scores(self) -> Scores:
        """The means; ends the run."""
        count = max(self.audit[2], 1.0)
        return Scores(
            self.total.div_(self.samples).numpy(),
            self.square.div_(self.samples).numpy(),
            self.samples,
            float(self.audit[0] / count),
            float(self.audit[1] / count),
        )


Shards = Callable[[int], Sequence[Mapping[str, NDArray[Any]]]]
"""The sums of every shard of a pass, by the pass's number."""


@dataclass(frozen=True)
class Scoring:
    """A scoring run: which games are played, on which table, and how their values are estimated.

    Args:
        game: What a coalition is worth.
        weight: The table, ``(n, D)``.
        fill: Placeholder per field, ``(fields, D)``.
        samples: Which games to play.
        estimator: :class:`Owen` or :class:`Permutation`.
        seed: Root of all draws.
        batch_size: Samples at once, at least 1.
    """

    game: Game
    weight: Tensor
    fill: Tensor
    samples: Samples
    estimator: Estimator
    seed: int = 0
    batch_size: int = 1024

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"`batch_size` must be at least 1, but got batch_size={self.batch_size}.")

    def tally(self, checkpoint: Checkpoint | None = None) -> ScoreSums:
        """Sums of no sample yet, or those of the checkpoint."""
        return ScoreSums((self.weight.shape[0], self.weight.shape[1]), checkpoint)

    def shard(self, pass_index: int, index: int, shards: int, checkpoint: Checkpoint | None = None) -> ScoreSums:
        """The sums over one of ``shards`` parts of a pass: whole batches, as near as can be to equally many.

        What a sample draws depends on its place in the pass, and which batches there are on the batch size; so the
        parts of a pass add up to the pass, to rounding, however many they are and whoever plays them.
        """
        batches = -(-len(self.samples) // self.batch_size)
        start, stop = (batches * i // shards * self.batch_size for i in (index, index + 1))
        tally = self.tally(checkpoint)
        self.play(tally, pass_index, start + tally.samples, min(stop, len(self.samples)))
        return tally

    def scores(self, passes: int = 1, tolerance: float = 0.01, checkpoint: Checkpoint | None = None) -> Scores:
        """All samples, one pass after the other; see :func:`attribute`."""
        tally = self.tally(checkpoint)
        for pass_index in range(tally.samples // len(self.samples), _passes(passes)):
            if pass_index and tally.converged(tolerance):
                break
            self.play(tally, pass_index, tally.samples - pass_index * len(self.samples), len(self.samples))
        return tally.scores()

    def merged(self, shards: Shards, passes: int = 1, tolerance: float = 0.01) -> Scores:
        """As :meth:`scores`, each pass added up from the sums of its shards, in their order."""
        tally = self.tally()
        for pass_index in range(_passes(passes)):
            if pass_index and tally.converged(tolerance):
                break
            for sums in shards(pass_index):
                tally.include(sums)
        return tally.scores()

    @torch.no_grad()
    def play(self, tally: ScoreSums, pass_index: int, start: int, stop: int) -> None:
        """Add samples ``start ... stop - 1`` of a pass to the sums."""
        placeholder = self.fill[self.samples.fields]
        stream = Stream(self.seed, f"coalitions/{pass_index}")
        for index, batch in _batches(self.samples, pass_index, self.batch_size, start, stop):
            vectors = functional.embedding(batch.rows, self.weight)
            values = self.estimator.estimate(self.game, vectors, placeholder, batch.labels, stream, batch.position)
            if index % AUDIT_EVERY == 0:
                empty = placeholder.expand_as(vectors)
                drop = self.game.value(vectors, batch.labels) - self.game.value(empty, batch.labels)
                tally.audit += [values.sum().item(), drop.sum().item(), len(vectors)]
            tally.add(batch.rows, values)
            tally.save()


def attribute(
    game: Game,
    weight: Tensor,
    fill: Tensor,
    samples: Samples,
    estimator: Estimator,
    *,
    seed: int = 0,
    batch_size: int = 1024,
    passes: int = 1,
    tolerance: float = 0.01,
    checkpoint: Checkpoint | None = None,
) -> Scores:
    """Stream over the samples and average the Shapley values of every table entry.

    Stops after a full pass once the largest standard error is below ``tolerance`` times the range of the means, or
    after ``passes`` passes. Memory: two score tables of the table's shape, and a few batches. The result depends on
    ``batch_size`` through rounding only.

    Args:
        game: What a coalition is worth.
        weight: The table, ``(n, D)``.
        fill: Placeholder per field, ``(fields, D)``.
        samples: Which games to play.
        estimator: :class:`Owen` or :class:`Permutation`.
        seed: Root of all draws.
        batch_size: Samples at once, at least 1.
        passes: Most passes over the samples, at least 1.
        tolerance: Of the stop rule.
        checkpoint: State of an interrupted run, and where to keep it.
    """
    return Scoring(game, weight, fill, samples, estimator, seed, batch_size).scores(passes, tolerance, checkpoint)


def _passes(passes: int) -> int:
    if passes < 1:
        raise ConfigError(f"`passes` must be at least 1, but got passes={passes}.")
    return passes


def _batches(
    samples: Samples, pass_index: int, batch_size: int, first: int, last: int
) -> Iterator[tuple[int, SampleBatch]]:
    """The batches of samples ``first ... last - 1`` of one pass, each with its number in the pass."""
    for start in range(first, last, batch_size):
        yield start // batch_size, samples.batch(start, min(start + batch_size, last), pass_index)


Score = Literal["geo", "abs", "rms", "signed"]


def ranking_keys(scores: Scores, counts: NDArray[np.int64], score: Score, exponent: float) -> NDArray[np.float32]:
    """Scores -> the key to rank by, ``(n, D)``: the largest are kept.

    ``abs``: ``|mean|``. ``rms``: ``sqrt(mean square)``. ``geo``: the geometric mean of the two. ``signed``: the mean.
    All are divided by ``frequency^exponent``, the row's training count (at least 1).
    """
    keys = _UNSCALED[score](scores)
    if exponent:
        keys /= (np.maximum(counts, 1).astype(np.float32) ** np.float32(exponent))[:, None]
    return keys


def _geo(scores: Scores) -> NDArray[np.float32]:
    keys = np.sqrt(scores.square)
    keys *= np.abs(scores.mean)
    return np.sqrt(keys, out=keys)


_UNSCALED = {
    "abs": lambda scores: np.abs(scores.mean),
    "rms": lambda scores: np.sqrt(scores.square),
    "geo": _geo,
    "signed": lambda scores: np.array(scores.mean),
}
