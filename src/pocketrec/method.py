"""How a smaller table is found: ``prepare`` once, budget-free; a table for any budget as often as you like.

:func:`compress` is the verb: it prepares a method once, makes a table for each budget, and wraps it as a
:class:`Small` that can be saved as one file.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

from pocketrec.artifact import CHUNK, Contents, Kind
from pocketrec.backbone import Model, RankingModel
from pocketrec.baked import BakedModel
from pocketrec.errors import BudgetError, ConfigError
from pocketrec.files import canonical_json
from pocketrec.packed import Index, Storage
from pocketrec.run import Run
from pocketrec.table import Table
from pocketrec.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pocketrec.dataset import Dataset

_HEADS = 4
"""Heads that are tried where a file has room left."""

_HEADER_DIGITS = 128
"""By about how much the header of a larger file may be longer."""

_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Budget:
    """How small: ``sparsity`` (values removed), ``share`` (of dense fp32 table bytes kept), ``bytes`` (of the file).

    Example:
        >>> Budget.parse("sparsity=0.95"), Budget.parse("5%"), Budget.parse("4 MiB")
        (Budget(kind='sparsity', amount=0.95), Budget(kind='share', amount=0.05), Budget(kind='bytes', amount=4194304))
    """

    kind: Literal["sparsity", "share", "bytes"]
    amount: float

    @classmethod
    def parse(cls, text: str | Budget) -> Budget:
        """Read ``sparsity=0.95``, ``5%``, ``4MiB`` or ``4 MiB``."""
        if isinstance(text, Budget):
            return text
        number = r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*"
        if (m := re.fullmatch(rf"\s*sparsity\s*={number}", text)) and 0 <= float(m[1]) < 1:
            return cls("sparsity", float(m[1]))
        if (m := re.fullmatch(rf"{number}%\s*", text)) and 0 < float(m[1]) <= 100:
            return cls("share", float(m[1]) / 100)
        if (m := re.fullmatch(rf"{number}({'|'.join(_UNITS)})\s*", text)) and float(m[1]) > 0:
            return cls("bytes", int(float(m[1]) * _UNITS[m[2]]))
        raise ConfigError(
            f"`budget` must be like 'sparsity=0.95' (0 <= s < 1), '5%' (0 < p <= 100) or '4MiB', but got {text!r}."
        )


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
        trains: whether it trains a model of its own, by its field ``training``, instead of shrinking a trained one.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, model: Model, data: Dataset, run: Run) -> Ladder:
        """The expensive, budget-free part; long steps go through ``run.once`` / ``run.fit`` and so resume."""

    def config(self) -> dict[str, Any]:
        """Name and settings, ready for JSON."""
        return {"name": self.name, **asdict(self)}  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Small:
    """A compressed model: the same head around a smaller table.

    Attributes:
        model: the model, with ``model.table`` the smaller table.
        data: the data set that it was trained on; its vocabulary goes into the file.
        method: how the table was found.
        budget: what was asked for.
        storage: how kept values are stored in the file.
        index: how the file finds a row.
    """

    model: Model
    data: Dataset
    method: Method
    budget: Budget
    storage: Storage
    index: Index = "compact"

    @property
    def table(self) -> Table:
        """The smaller table."""
        return self.model.table

    @cached_property
    def values(self) -> int:
        """Learned scalars that survive."""
        return self.table.values()

    @property
    def sparsity(self) -> float:
        """Share of counted scalars that were removed."""
        return 1 - self.values / _counted(self.table)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of the file and its parts, before it is written."""
        return self.contents.sizes()

    @cached_property
    def contents(self) -> Contents:
        """What goes into the file."""
        stored = self.table.stored().numpy()
        vocabulary, rows = Vocabulary.build(self.data.schema, stored, self.data.hashes)
        backbone = self.model.backbone
        info = {
            "backbone": {"name": backbone.name, "config": asdict(backbone)},  # pyright: ignore[reportArgumentType]
            "method": self.method.config(),
            "budget": asdict(self.budget),
            "storage": self.storage,
            "values": self.values,
            "sparsity": self.sparsity,
            "data": self.data.digest,
        }
        packed = self.table.pack(self.storage, rows, self.index)
        return Contents(_kind(self.model), self.data.schema, vocabulary, packed, self.model.lower(), info)

    def save(self, path: str | Path) -> dict[str, int]:
        """Write the file atomically; bytes of the file and its parts."""
        return self.contents.write(path)


@overload
def compress(
    model: Model,
    data: Dataset,
    method: Method,
    budget: str | Budget,
    *,
    run: Run | str | Path | None = None,
    storage: Storage | None = None,
    index: Index = "compact",
    bake: bool = False,
) -> Small: ...


@overload
def compress(
    model: Model,
    data: Dataset,
    method: Method,
    budget: Sequence[str | Budget],
    *,
    run: Run | str | Path | None = None,
    storage: Storage | None = None,
    index: Index = "compact",
    bake: bool = False,
) -> list[Small]: ...


def compress(
    model: Model,
    data: Dataset,
    method: Method,
    budget: str | Budget | Sequence[str | Budget],
    *,
    run: Run | str | Path | None = None,
    storage: Storage | None = None,
    index: Index = "compact",
    bake: bool = False,
) -> Small | list[Small]:
    """Fit the model's table into a budget, or into each of several with one preparation.

    Args:
        model: A trained model with a dense table; it is left as it is.
        data: The data set of its training; only training rows are read.
        method: How to find the smaller table.
        budget: ``"sparsity=0.95"`` (share of values removed), ``"5%"`` (of the dense table's bytes) or ``"4MiB"`` (the
            whole file), or several of them.
        run: A folder that keeps the preparation: a later budget takes seconds.
        storage: ``fp32``, ``fp16`` or ``int8``; by default ``fp32`` for a sparsity, ``int8`` for a budget in bytes.
        index: ``compact`` finds a row in the fewest bytes, ``direct`` in the least time.
        bake: For ranking models: propagate first and compress the final vectors, as a device needs them.

    Raises:
        BudgetError: A budget cannot be reached; the error knows the least size that can.
        ConfigError: A budget, storage or index that is none.

    Example:
        >>> small = compress(model, data, MagPrune(), "4MiB", run="runs/mag")  # doctest: +SKIP
        >>> small.save("model.safetensors")["file"] <= 4 << 20  # doctest: +SKIP
        True
    """
    if not isinstance(run, Run):
        with Run(run) as opened:
            return compress(model, data, method, budget, run=opened, storage=storage, index=index, bake=bake)
    single = isinstance(budget, (str, Budget))
    budgets = [Budget.parse(b) for b in ([budget] if single else budget)]
    if bake:
        model = BakedModel.of(model)
    ladder = method.prepare(model, data, run)

    def at(budget: Budget) -> Small:
        chosen = storage or ("fp32" if budget.kind == "sparsity" else "int8")
        return _at(ladder, Small(model, data, method, budget, chosen, index))

    return at(budgets[0]) if single else [at(b) for b in budgets]


def _at(ladder: Ladder, dense: Small) -> Small:
    """The table for one budget, in place of the dense one."""
    small = sized(ladder, dense)
    return replace(small, model=ladder.finish(small.model))


def sized(ladder: Ladder, dense: Small) -> Small:
    """The table of the right size in place of the dense one, not yet trained where the method trains.

    ``ladder.finish(small.model)`` is then what :func:`compress` returns.
    """
    budget, table = dense.budget, dense.table
    if budget.kind == "bytes":
        return _fit_file(ladder, dense, int(budget.amount))
    if budget.kind == "share":
        dense_bytes = 4 * sum(b.values for b in table.blocks)
        return _with(dense, ladder.at_bytes(int(budget.amount * dense_bytes), dense.storage, index=dense.index))
    values = _counted(table)
    return _with(dense, ladder.at_values(values - int(values * budget.amount)))


def _header_guess(dense: Small, limit: int) -> int:
    """About the bytes of the header, rather more: escaped JSON, and a digest per MiB."""
    document = [dense.data.schema.to_json(), dense.model.lower().to_json(), dense.method.config()]
    return int(1.3 * len(canonical_json(document))) + 2048 + limit // CHUNK * 64


def _fit_file(ladder: Ladder, dense: Small, limit: int) -> Small:
    """The largest table whose whole file takes at most ``limit`` bytes, to 0.1 %.

    Head and header hardly depend on the table: what they leave goes to table and vocabulary, and each trial knows them
    better than the one before.
    """
    goal = limit - _growth(dense)
    least = ladder.headed(dense.model, 0)
    if least is dense.model:
        return _fit_beside(ladder, dense, limit, goal, goal - _header_guess(dense, goal))
    found = _fit_room(ladder, replace(dense, model=least), limit, 0)
    room = goal - found.sizes["header"] - _HEADER_DIGITS
    for _ in range(_HEADS):
        other = _fit_beside(ladder, replace(dense, model=ladder.headed(dense.model, room)), limit, goal, room)
        waste = goal - other.sizes["file"]
        if waste >= 0 and other.sizes["file"] <= found.sizes["file"]:
            break
        found = other if waste >= 0 else found
        if 0 <= waste <= goal // 1000:
            break
        room += waste
    return found


def _fit_beside(ladder: Ladder, dense: Small, limit: int, goal: int, room: int) -> Small:
    """The largest table beside a head; together with the vocabulary they take about ``room`` bytes."""
    head = sum(t.nbytes for t in dense.model.lower().tensors().values())
    small = _fit_room(ladder, dense, limit, room - head)
    beside = _beside(small)
    while not 0 <= goal - small.sizes["file"] <= goal // 1000:
        last, small = small, _fit_room(ladder, dense, limit, goal - beside)
        if small.sizes["file"] <= goal and (_beside(small) <= beside or small.sizes == last.sizes):
            break
        beside = max(beside + 1, _beside(small))
    return small


def _fit_room(ladder: Ladder, dense: Small, limit: int, room: int) -> Small:
    """The largest table that fits with its vocabulary into ``room`` bytes, or else the smallest there is."""
    try:
        return _with(dense, ladder.at_bytes(room, dense.storage, index=dense.index, vocabulary=True))
    except BudgetError as error:
        small = _with(dense, _least(ladder, dense, error))
        named = replace(small, budget=Budget("bytes", small.sizes["file"]))
        if (least := max(small.sizes["file"], named.sizes["file"]) + _growth(dense)) > limit:
            raise BudgetError(
                f"Budget {limit:,} B is below the {least:,} B of the smallest file that {dense.method.name} can make "
                "of this model; raise the budget or choose a smaller head.",
                least_bytes=least,
            ) from error
        return small


def _growth(dense: Small) -> int:
    """Bytes by which the header may still grow where the head is trained again: a number takes up to 24 digits."""
    if not dense.method.trains:
        return 0
    numbers = [n for op in dense.model.lower().ops for n in op.attributes.values() if isinstance(n, float)]
    return sum(24 - len(canonical_json(n)) + 8 for n in numbers)


def _beside(small: Small) -> int:
    """Bytes of the file beside table and vocabulary."""
    return small.sizes["head"] + small.sizes["header"]


def _least(ladder: Ladder, dense: Small, error: BudgetError) -> Table:
    """The smallest table there is, from the error that named its size."""
    if error.least_bytes is None:
        raise error
    return ladder.at_bytes(error.least_bytes, dense.storage, index=dense.index, vocabulary=True)


def _with(small: Small, table: Table) -> Small:
    return replace(small, model=small.model.with_table(table))


def _counted(table: Table) -> int:
    """Scalars of the counted blocks of the dense table."""
    return sum(b.values for b in table.blocks if b.counted)


def _kind(model: Model) -> Kind:
    if not isinstance(model, RankingModel):
        return "ctr"
    return "ego" if model.propagates else "baked"
