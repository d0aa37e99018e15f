"""The laboratory: tiny data sets of its own, models on them, and the words in which a check speaks."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch

from pocketrec import registry
from pocketrec.data.dataset import Dataset
from pocketrec.data.encode import encode
from pocketrec.data.source import Batch, Column, Scan, Source
from pocketrec.errors import PocketRecError
from pocketrec.models.backbone import Backbone, Model
from pocketrec.randomness import generator
from pocketrec.schema import Task
from pocketrec.training.loop import Training
from pocketrec.training.run import Run
from pocketrec.training.train import train

ROWS = 600


class ExamFailed(AssertionError):
    """A plug-in breaks a law of its axis."""


def require(passed: bool, expected: str, came: object = None) -> None:
    """Raise :class:`ExamFailed` unless ``passed``."""
    if not passed:
        raise ExamFailed(f"expected {expected}" + ("" if came is None else f", but got {came}") + ".")


def same(name: str, one: Any, other: Any, *, within: float = 0.0) -> None:
    """Require two arrays to have one shape and to differ by at most ``within`` everywhere."""
    a, b = _array(one), _array(other)
    require(a.shape == b.shape, f"{name} of shape {a.shape}", b.shape)
    gap = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()) if a.size else 0.0
    require(gap <= within, f"{name} to agree within {within:g}", f"a difference of {gap:g}")


@contextlib.contextmanager
def refused(what: str) -> Iterator[list[PocketRecError]]:
    """Require the block to raise one of PocketRec's own errors; it is appended to the list."""
    caught: list[PocketRecError] = []
    try:
        yield caught
    except PocketRecError as error:
        require(len(str(error)) > 20, f"{what} to be refused with a message that helps", repr(str(error)))
        caught.append(error)
    except Exception as error:
        raise ExamFailed(f"expected {what} to raise a PocketRecError, but got {error!r}.") from error
    require(bool(caught), f"{what} to be refused", "no error")


@contextlib.contextmanager
def untouched_globals() -> Iterator[None]:
    """Require the global random states, the default type and the thread count to be as before."""
    before = _globals()
    yield
    require(_globals() == before, "global random states, default dtype and thread count to stay as they were")


def fingerprint(model: Model) -> str:
    """SHA-256 over every parameter and buffer, by name."""
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


@dataclass(frozen=True)
class LabClicks(Source):
    """A click log without a file: three string fields of at most 40, 7 and 1 values.

    Args:
        seed: of the values and the clicks.
    """

    name: ClassVar[str] = "drawn"
    generates: ClassVar[bool] = True

    seed: int = 0

    def scan(self, path: Path | None = None, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`; ``path`` is not read."""
        rng = generator(self.seed, "exam clicks")
        shop, day = rng.zipf(1.3, ROWS) % 40, rng.integers(0, 7, ROWS)
        logit = rng.normal(0, 1.5, 40)[shop] + rng.normal(0, 0.7, 7)[day]
        clicks = rng.random(ROWS) < 1 / (1 + np.exp(-logit))
        frame = pl.DataFrame(
            {
                "shop": [f"s{v}" for v in shop],
                "day": [f"d{v}" for v in day],
                "site": ["only"] * ROWS,
                "label": clicks.astype(np.int8),
            }
        )
        found = (Column("shop"), Column("day"), Column("site"))
        return Scan(found, iter([Batch(frame, np.arange(1, ROWS + 1))]), label="label")


@dataclass(frozen=True)
class LabVisits(Source):
    """Interactions without a file: 30 users, each with 6 to 12 of 40 items, most of them of its own half.

    Args:
        seed: of the interactions.
    """

    name: ClassVar[str] = "visited"
    task: ClassVar[Task] = "cf"
    generates: ClassVar[bool] = True

    seed: int = 0

    def scan(self, path: Path | None = None, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`; ``path`` is not read."""
        rng = generator(self.seed, "exam visits")
        users, items = [], []
        for user in range(30):
            liked = np.where(np.arange(40) % 2 == user % 2, 4.0, 1.0)
            chosen = rng.choice(40, rng.integers(6, 13), replace=False, p=liked / liked.sum())
            users += [user] * len(chosen)
            items += sorted(int(item) for item in chosen)
        frame = pl.DataFrame({"user": users, "item": items})
        found = (Column("user", "dense", 30), Column("item", "dense", 40))
        return Scan(found, iter([Batch(frame, np.arange(1, len(users) + 1))]))


class Lab:
    """Data and models for one exam; everything lies in ``folder`` and is made once. Methods train for two epochs.

    Args:
        folder: where the lab works.
        raw: a small file that the examined source reads.
    """

    def __init__(self, folder: Path, raw: Path | None = None) -> None:
        self.folder, self.raw = folder, raw
        self.training = Training(epochs=2)
        self.run = Run(None, training=self.training)
        self._models: dict[Backbone, Model] = {}
        self._places = 0

    @cached_property
    def clicks(self) -> Dataset:
        """A click log: 600 rows, three fields, one of them with a single value."""
        return encode(LabClicks(), None, self.place(), threshold=2)

    @cached_property
    def visits(self) -> Dataset:
        """Interactions of 30 users with 40 items."""
        return encode(LabVisits(), None, self.place())

    def data(self, task: Task) -> Dataset:
        """The data set of a task."""
        return self.clicks if task == "ctr" else self.visits

    def without_test(self, task: Task) -> Dataset:
        """The data set of a task whose test split cannot be read: whoever touches it fails."""
        data = Dataset.open(self.data(task).path)
        del data.splits["test"]
        return data

    @cached_property
    def backbones(self) -> tuple[Backbone, ...]:
        """Every registered backbone with a head of a few units: what methods do to tables does not depend on it."""
        return tuple(registry.load("backbones", name)().small() for name in registry.modules("backbones"))

    def model(self, backbone: Backbone) -> Model:
        """A model of this backbone after one epoch; shared, so checks that change it copy it first."""
        if backbone not in self._models:
            training = Training(epochs=1, batch_size=64)
            self._models[backbone] = train(backbone, self.data(backbone.task), Run(None), training)
        return self._models[backbone]

    def place(self) -> Path:
        """A path inside the folder that nothing has used yet."""
        self._places += 1
        return self.folder / f"place{self._places:04d}"


Check = Callable[[Any, Lab], None]


def _array(value: Any) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _globals() -> tuple[Any, ...]:
    # numpy's legacy state is read, never drawn from: the point is that nobody else draws from it either.
    numpy_state = np.random.get_state()  # noqa: NPY002
    return (
        random.getstate(),
        torch.random.get_rng_state().numpy().tobytes(),
        numpy_state[1].tobytes(),  # type: ignore[union-attr]
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )
