"""The samples that games are played on: training rows of clicks, and training pairs with a sampled negative."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketrec.data.dataset import Split
from pocketrec.data.sampling import triples
from pocketrec.errors import DataError
from pocketrec.randomness import generator


@dataclass(frozen=True)
class SampleBatch:
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

    def batch(self, start: int, stop: int, pass_index: int) -> SampleBatch:
        """Samples ``start ... stop - 1``; a pure function of its arguments."""
        ...


def training_rows(split: Split) -> Split:
    """The split itself; anything but training rows raises :class:`~pocketrec.errors.DataError`."""
    if split.name != "train":
        raise DataError(
            f"Scoring reads training rows only, but got the split {split.name!r}: scores that have seen it would make "
            "its figures worthless; pass `data.train`."
        )
    if len(split) == 0:
        raise DataError("Scoring needs at least one training row, but the split is empty; encode more rows.")
    return split


@dataclass(frozen=True)
class ClickSamples:
    """Training rows of a click log, all of them or ``cap`` drawn without replacement, in file order."""

    split: Split
    cap: int | None
    seed: int

    @property
    def fields(self) -> Tensor:
        """One player row per field."""
        return torch.arange(self.split.ids.shape[1])

    def __len__(self) -> int:
        return len(self.split) if self.cap is None else min(self.cap, len(self.split))

    @cached_property
    def _picked(self) -> NDArray[np.int64] | None:
        if len(self) == len(self.split):
            return None
        return np.sort(generator(self.seed, "scoring rows").choice(len(self.split), len(self), replace=False))

    def batch(self, start: int, stop: int, pass_index: int) -> SampleBatch:
        """Ids and labels."""
        if self.split.labels is None:
            raise DataError("Click samples need labels, but the split has none; score a ranking model on it.")
        picked = slice(start, stop) if self._picked is None else self._picked[start:stop]
        rows = torch.from_numpy(self.split.ids[picked].astype(np.int64))
        labels = torch.from_numpy(np.array(self.split.labels[picked], np.float32))
        return SampleBatch(start, rows, labels)


@dataclass(frozen=True)
class RankingSamples:
    """Training pairs with one sampled negative each; another one in every pass, and other pairs under a ``cap``."""

    split: Split
    cap: int | None
    seed: int

    @property
    def fields(self) -> Tensor:
        """User, positive item, negative item."""
        return torch.tensor([0, 1, 1])

    def __len__(self) -> int:
        return len(self.split) if self.cap is None else min(self.cap, len(self.split))

    def batch(self, start: int, stop: int, pass_index: int) -> SampleBatch:
        """Triples; their label is one: the positive wins."""
        rows = torch.from_numpy(self._triples(pass_index)[start:stop].astype(np.int64))
        return SampleBatch(start, rows, torch.ones(len(rows)))

    @cached_property
    def _drawn(self) -> dict[int, NDArray[np.int64]]:
        return {}

    def _triples(self, pass_index: int) -> NDArray[np.int64]:
        """The pass's triples ``(N, 3)``; those of one pass at a time are kept."""
        if pass_index not in self._drawn:
            schema = self.split.dataset.schema
            drawn = triples(self.split.ids, schema.fields[0].size, schema.rows, self.seed, pass_index, shuffle=True)
            self._drawn.clear()
            self._drawn[pass_index] = drawn[: len(self)]
        return self._drawn[pass_index]
