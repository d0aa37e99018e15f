"""What a method is, and what it leaves behind: a table for any budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pocketrec import settings
from pocketrec.compression.budget import Room
from pocketrec.models.backbone import Model
from pocketrec.models.table import Table
from pocketrec.training.run import Run

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


class Ladder(ABC):
    """What ``prepare`` leaves behind: a table of the right size for any budget in seconds, then ``finish``."""

    @abstractmethod
    def table(self, room: Room) -> Table:
        """The best table for a room.

        Raises:
            BudgetError: not even the least table fits; the error names what it takes.
        """

    def headed(self, model: Model, room: Room) -> Model:
        """The model with its head as it goes into a room of bytes, which head, table and keys share.

        By default it is the head as it is. The table then gets what the head leaves.
        """
        return model

    def finish(self, model: Model, room: Room) -> Model:
        """The final model around a table that :meth:`table` has made; by default it is final already.

        A method that trains does so here, once per budget. The final table must fit into the room as well: a mask that
        stays does, and a method that cuts after its training cuts to the room.

        Args:
            model: the dense model's head around the table.
            room: the one that the table was made for.
        """
        return model


@dataclass(frozen=True)
class Finished(Ladder):
    """Tables of another ladder, and what is made of the model around them.

    Args:
        ladder: makes the tables.
        last: the final model from the model around such a table, and its room.
    """

    ladder: Ladder
    last: Callable[[Model, Room], Model]

    def table(self, room: Room) -> Table:
        """As the other ladder's."""
        return self.ladder.table(room)

    def headed(self, model: Model, room: Room) -> Model:
        """As the other ladder's."""
        return self.ladder.headed(model, room)

    def finish(self, model: Model, room: Room) -> Model:
        """What is made of the other ladder's final model."""
        return self.last(self.ladder.finish(model, room), room)


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
    above: ClassVar[Mapping[str, float]] = {}
    """What settings must be above, see :func:`pocketrec.settings.check_above`."""

    def __post_init__(self) -> None:
        if is_dataclass(self):
            settings.check(self, **self.bounds)
            settings.check_above(self, **self.above)
            self.check()

    def check(self) -> None:  # noqa: B027
        """Refuse settings beyond what annotations and bounds say; by default none."""

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
