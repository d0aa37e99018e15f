"""What a method is, and what it leaves behind: a table for any budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pocketrec import settings
from pocketrec.models.backbone import Model
from pocketrec.models.table import Table
from pocketrec.packed import Index, Storage
from pocketrec.training.run import Run

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


class Ladder(ABC):
    """What ``prepare`` leaves behind: a table of the right size for any budget in seconds, then ``finish``."""

    @abstractmethod
    def at_values(self, values: int) -> Table:
        """The table that keeps at most ``values`` counted scalars (linear weights untouched)."""

    @abstractmethod
    def at_bytes(
        self, size_bytes: int, storage: Storage, *, index: Index = "compact", vocabulary: bool = False
    ) -> Table:
        """The best table whose packed form (all blocks, side arrays included) takes at most ``size_bytes``.

        With ``vocabulary``, the keys of the stored rows have to fit in, too.
        """

    def headed(self, model: Model, size_bytes: int) -> Model:
        """The model with its head as it goes into so many bytes, which head, table and vocabulary share.

        By default it is the head as it is. The table then gets what the head leaves.
        """
        return model

    def finish(self, model: Model) -> Model:
        """The final model around a table that ``at_values`` or ``at_bytes`` has made; by default it is final already.

        A method that trains does so here, once per budget: the size of the file must not depend on what is learned.

        Args:
            model: the dense model's head around the table.
        """
        return model


class Method(ABC):
    """A frozen dataclass that is its own configuration; one file per method in ``methods/``.

    Attributes:
        name: in the registry and on the command line.
        trains: whether it trains a model of its own, by the run's ``training``, instead of shrinking a trained one.
        version: rises when a default or a meaning changes, so that stored work of the other one is not taken.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = False
    version: ClassVar[int] = 1
    bounds: ClassVar[Mapping[str, float]] = {}
    """Least values of settings, see :func:`pocketrec.settings.check`."""

    def __post_init__(self) -> None:
        if is_dataclass(self):
            settings.check(self, **self.bounds)

    @property
    def starts_from(self) -> Literal["trained", "fresh"]:
        """Whether it reads the weights of the ``trained`` model, or starts ``fresh`` from random numbers."""
        return "fresh" if self.trains else "trained"

    @abstractmethod
    def prepare(self, model: Model, data: Dataset, run: Run) -> Ladder:
        """The expensive, budget-free part; long steps go through ``run.once`` / ``run.fit`` and so resume."""

    def small(self) -> Self:
        """The method with as short a search as keeps every law, for exams; by default itself."""
        return self

    def config(self) -> dict[str, Any]:
        """Name and all settings, ready for JSON."""
        return {"name": self.name, **settings.to_json(self)}
