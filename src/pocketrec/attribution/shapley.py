"""Shapley values of table entries: what each stored scalar is worth to the loss.

One game per training sample: the players are the scalars of its looked-up vectors ``e (F, D)``; a coalition keeps its
players at their trained value and the others at a placeholder ``c (F, D)``; its value is minus the loss of the head.
The score of a table entry is the mean, over *all* samples, of its players' Shapley values, so frequency is part of it
and the scores add up: ``sum_i phi_i = mean[loss(empty) - loss(full)]``.

Two estimators: :class:`Owen`, a few gradients of the multilinear extension per sample, exact in expectation where the
head is multilinear in the coordinates (linear weights, factorisation machine, inner product) and an approximation
elsewhere; :class:`Permutation`, unbiased, much dearer.

Reference: Castro et al., "Polynomial calculation of the Shapley value based on sampling", 2009; Okhrati and Lipani,
"A multilinear sampling algorithm to estimate Shapley values", 2020; Covert et al., "Understanding global feature
contributions with additive importance measures" (SAGE), 2020.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pocketrec.attribution.gradient import Head
from pocketrec.attribution.walk import Walk
from pocketrec.errors import ConfigError, DivergedError
from pocketrec.files import boundary

AUDIT_EVERY = 16
DIAGONAL = 0.2

Levels = Literal["uniform", "centre", "anchored"]


@dataclass(frozen=True)
class Stream:
    """Random bits as a pure function of ``(seed, purpose, position)``: sample ``i`` draws the same in any batch."""

    seed: int
    purpose: str

    def words(self, position: int, samples: int, count: int) -> NDArray[np.uint64]:
        """Bits for samples ``position ... position + samples - 1``: ``(samples, count)``, padded to whole blocks."""
        blocks = -(-count // 4)
        key = int.from_bytes(hashlib.blake2b(f"{self.seed}/{self.purpose}".encode(), digest_size=16).digest(), "little")
        generator = np.random.Philox(key=key, counter=position * blocks)
        return generator.random_raw(samples * blocks * 4).reshape(samples, blocks * 4)

    def shorts(self, position: int, samples: int, count: int) -> Tensor:
        """Uniform 16-bit integers ``(samples, count)``, int16."""
        return torch.from_numpy(self.words(position, samples, -(-count // 4)).view(np.int16)[:, :count])

    def signs(self, position: int, samples: int, count: int) -> Tensor:
        """Uniform signed bytes ``(samples, count)``, int8: as many negative as not."""
        return torch.from_numpy(self.words(position, samples, -(-count // 8)).view(np.int8)[:, :count])

    def orders(self, position: int, samples: int, count: int) -> Tensor:
        """Uniform permutations of ``0 ... count - 1``: ``(samples, count)``, int64."""
        return torch.from_numpy(self.words(position, samples, count)[:, :count].argsort(axis=1))


class Game(ABC):
    """A batch of games: ``value = -loss`` of ``vectors (B, P, D)``, and its gradient."""

    @abstractmethod
    def value(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """``(B, P, D), (B,) -> (B,)``."""

    @abstractmethod
    def gradient(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each sample's value: ``(B, P, D)``, a new tensor."""

    def pair(self, centre: Tensor, offset: Tensor, labels: Tensor) -> Tensor:
        """``gradient(centre + offset) + gradient(centre - offset)``: ``(B, P, D)``, a new tensor."""
        return self.gradient(centre + offset, labels).add_(self.gradient(centre - offset, labels))

    def walk(self, vectors: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that sets player ``(B,)`` to ``(B,)`` in its own copy of ``vectors`` and returns the values."""
        current = vectors.clone()
        flat, row = current.view(len(current), -1), torch.arange(len(current))

        def step(player: Tensor, new: Tensor) -> Tensor:
            flat[row, player] = new
            return self.value(current, labels)

        return step


@dataclass(frozen=True)
class ClickGame(Game):
    """Minus the binary cross-entropy of the head's logit; one player row per field."""

    head: Head

    def value(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Log-likelihood of the labels, ``(B,)``."""
        return _log_likelihood(self.head.logits(vectors), labels)

    def gradient(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """``(y - sigmoid(logit))`` pulled back through the head."""
        return self.head.pull(labels - self.head.logits(vectors).sigmoid())

    def spread(self, vectors: Tensor) -> Tensor:
        """``sqrt(p (1 - p))`` pulled back: the deviation of the gradient if the label is drawn from the model."""
        return self.head.pull(_deviation(self.head.logits(vectors)))

    def pair(self, centre: Tensor, offset: Tensor, labels: Tensor) -> Tensor:
        """Both points as one batch; their gradients share the first layer's product."""
        points = torch.empty(2, *centre.shape)
        torch.add(centre, offset, out=points[0])
        torch.sub(centre, offset, out=points[1])
        return self.head.pull(labels.repeat(2) - self.head.logits(points.flatten(0, 1)).sigmoid(), parts=2)

    def walk(self, vectors: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """As the plain walk, but only what a change reaches is computed again."""
        walk = Walk(self.head, vectors)
        return lambda player, new: _log_likelihood(walk.set(player, new), labels)


@dataclass(frozen=True)
class RankingGame(Game):
    """Minus the BPR loss ``softplus(s_uq - s_up)``; player rows are user, positive, negative (``labels`` are ones)."""

    head: Head

    def _margin(self, vectors: Tensor) -> Tensor:
        positive, negative = self.head.logits(_pairs(vectors)).view(2, -1)
        return positive - negative

    def value(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Log-likelihood of the labels, ``(B,)``."""
        return _log_likelihood(self._margin(vectors), labels)

    def gradient(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """The two pairs share the user: its gradients add up."""
        return self._pull(labels - self._margin(vectors).sigmoid())

    def spread(self, vectors: Tensor) -> Tensor:
        """``sqrt(p (1 - p))`` of the margin pulled back through both scores."""
        return self._pull(_deviation(self._margin(vectors)))

    def _pull(self, slope: Tensor) -> Tensor:
        """The slope of the margin ``(B,)`` at the last pairs."""
        positive, negative = self.head.pull(torch.cat((slope, -slope))).view(2, len(slope), 2, -1)
        return torch.stack((positive[:, 0] + negative[:, 0], positive[:, 1], negative[:, 1]), dim=1)


def _pairs(vectors: Tensor) -> Tensor:
    """User, positive, negative ``(B, 3, d)`` -> the pairs (user, positive), then (user, negative): ``(2 B, 2, d)``."""
    return torch.cat((vectors[:, :2], vectors[:, ::2]))


def _deviation(logits: Tensor) -> Tensor:
    """Standard deviation of a label that is one with probability ``sigmoid(logit)``."""
    p = logits.sigmoid()
    return (p * (1 - p)).sqrt_()


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """``-BCE`` per sample, from logits."""
    return -functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")


class Estimator(Protocol):
    """How the Shapley values of a batch of games are estimated."""

    def estimate(
        self, game: Game, vectors: Tensor, placeholder: Tensor, labels: Tensor, stream: Stream, position: int
    ) -> Tensor:
        """``vectors (B, P, D)``, ``placeholder (P, D)`` -> values ``(B, P, D)``, float32."""
        ...


@dataclass(frozen=True)
class Owen:
    """Antithetic pairs of gradients of the Owen multilinear extension.

    ``phi = (e - c) * E_q E_z grad v(c + z (e - c))`` with ``z ~ Bernoulli(q)`` per coordinate; each pair also takes the
    complement ``1 - z``. ``levels`` says where ``q`` lies:

    * ``uniform``: ``q ~ U(0, 1)`` per sample, Owen's integral. Exact in expectation where the value is multilinear. On
      other heads it weighs the end of a coordinate that the context favours: 13 to 21 % of the sum of values is lost on
      MovieLens-1M.
    * ``centre``: ``q = 1/2``, the midpoint rule. A coordinate meets both its ends equally often in every context, so
      the mean gradient is a trapezoid rule for the difference ``v(e) - v(c)`` that a Shapley value is made of. Exact
      for multilinear values of degree two or less, and less noisy.
    * ``anchored``: as ``centre``, plus a noiseless part, at four more gradients and two values a sample: one fifth of
      the estimate is the integral along the diagonal from ``c`` to ``e`` (Gauss-Lobatto, four nodes), and what each
      sample's values lack to ``v(e) - v(c)`` is shared out in proportion to their size. Nearest to the true values.

    Reference: Owen, "Multilinear extensions of games", 1972; Okhrati and Lipani, "A multilinear sampling algorithm to
    estimate Shapley values", 2020.
    """

    pairs: int = 1
    levels: Levels = "uniform"

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ConfigError(f"`pairs` must be at least 1, but got pairs={self.pairs}.")
        if self.levels not in get_args(Levels):
            raise ConfigError(f"`levels` must be one of {', '.join(get_args(Levels))}, but got {self.levels!r}.")

    def estimate(
        self, game: Game, vectors: Tensor, placeholder: Tensor, labels: Tensor, stream: Stream, position: int
    ) -> Tensor:
        """See :class:`Estimator`."""
        centre = (vectors + placeholder).mul_(0.5)
        half = vectors - centre
        total = torch.zeros_like(vectors)
        for kept in self._coalitions(len(vectors), placeholder.numel(), stream, position).unbind(1):
            total += game.pair(centre, torch.where(kept.view_as(half), half, -half), labels)
        total.div_(self.pairs)
        if self.levels != "anchored":
            return total.mul_(half)
        values = total.lerp_(_diagonal(game, centre, half, labels), DIAGONAL).mul_(half)
        drop = game.value(vectors, labels) - game.value(placeholder.expand_as(vectors), labels)
        return _adding_up(values, drop)

    def _coalitions(self, samples: int, players: int, stream: Stream, position: int) -> Tensor:
        """Which players the first member of each pair keeps: bool ``(samples, pairs, players)``."""
        if self.levels != "uniform":
            return stream.signs(position, samples, self.pairs * players).view(samples, self.pairs, players) < 0
        bits = stream.shorts(position, samples, self.pairs * (players + 1)).view(samples, self.pairs, players + 1)
        return bits[..., 1:] < bits[..., :1]


def _diagonal(game: Game, centre: Tensor, half: Tensor, labels: Tensor) -> Tensor:
    """Twice the mean gradient along ``centre - half ... centre + half``, by Gauss-Lobatto quadrature."""
    inner = game.pair(centre, half / 5**0.5, labels)
    return inner.mul_(5 / 6).add_(game.pair(centre, half, labels), alpha=1 / 6)


def _adding_up(values: Tensor, drop: Tensor) -> Tensor:
    """Values whose sum is ``drop (B,)``: the missing part is shared out in proportion to their size."""
    size = values.abs()
    missing = drop - values.sum(dim=(1, 2))
    return values.addcmul_(size, (missing / size.sum(dim=(1, 2)).clamp_min(1e-30))[:, None, None])


@dataclass(frozen=True)
class Permutation:
    """Walks from the full to the empty coalition in uniform random order; unbiased.

    A player's value is the loss that its removal adds; ``antithetic`` walks each order backwards too. The values of a
    walk telescope to ``loss(empty) - loss(full)`` of the sample.
    """

    walks: int = 1
    antithetic: bool = True

    def __post_init__(self) -> None:
        if self.walks < 1:
            raise ConfigError(f"`walks` must be at least 1, but got walks={self.walks}.")

    def estimate(
        self, game: Game, vectors: Tensor, placeholder: Tensor, labels: Tensor, stream: Stream, position: int
    ) -> Tensor:
        """See :class:`Estimator`."""
        samples, players = len(vectors), placeholder.numel()
        empty = placeholder.reshape(-1)
        total = torch.zeros(samples, players)
        orders = stream.orders(position * self.walks, samples * self.walks, players).view(samples, self.walks, players)
        directions = (1, -1) if self.antithetic else (1,)
        for walk in range(self.walks):
            for direction in directions:
                order = orders[:, walk] if direction > 0 else orders[:, walk].flip(1)
                step, last = game.walk(vectors, labels), game.value(vectors, labels)
                for player in order.T:
                    value = step(player, empty[player])
                    total.scatter_add_(1, player[:, None], (last - value)[:, None])
                    last = value
        return total.div_(self.walks * len(directions)).view_as(vectors)


@dataclass(frozen=True)
class Batch:
    """Samples ``position ...``: table rows of their players ``(B, P)``, labels ``(B,)``."""

    position: int
    rows: Tensor
    labels: Tensor


class Samples(Protocol):
    """Games to play."""

    @property
    def fields(self) -> Tensor:
        """Which field's placeholder each player row takes: ``(P,)``."""
        ...

    def __len__(self) -> int: ...

    def batch(self, start: int, stop: int, pass_index: int) -> Batch:
        """Samples ``start ... stop - 1``; a pure function of its arguments."""
        ...


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


class Checkpoint(Protocol):
    """Where a long step keeps its state; see :class:`pocketrec.run.Checkpoint`."""

    def load(self) -> dict[str, NDArray[Any]] | None:
        """The last state, or ``None``."""
        ...

    def due(self) -> bool:
        """Whether it is time to save."""
        ...

    def save(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace the state."""
        ...


class Tally:
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

    def tally(self, checkpoint: Checkpoint | None = None) -> Tally:
        """Sums of no sample yet, or those of the checkpoint."""
        return Tally((self.weight.shape[0], self.weight.shape[1]), checkpoint)

    def shard(self, pass_index: int, index: int, shards: int, checkpoint: Checkpoint | None = None) -> Tally:
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
    def play(self, tally: Tally, pass_index: int, start: int, stop: int) -> None:
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


def _batches(samples: Samples, pass_index: int, batch_size: int, first: int, last: int) -> Iterator[tuple[int, Batch]]:
    """The batches of samples ``first ... last - 1`` of one pass, each with its number in the pass."""
    for start in range(first, last, batch_size):
        yield start // batch_size, samples.batch(start, min(start + batch_size, last), pass_index)
