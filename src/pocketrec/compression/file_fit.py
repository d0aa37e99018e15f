"""The largest table whose whole file, head and vocabulary included, fits a budget of bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pocketrec.compression.budget import Budget, Room
from pocketrec.compression.ladder import Ladder
from pocketrec.compression.small import Small
from pocketrec.errors import BudgetError
from pocketrec.files import canonical_json
from pocketrec.format.artifact import CHUNK
from pocketrec.models.table import Table

if TYPE_CHECKING:
    pass


_HEADS = 4
"""Heads that are tried where a file has room left."""

_CUTS = 4
"""How often a table may be cut after its training, at most."""

_HEADER_DIGITS = 128
"""By about how much the header of a larger file may be longer."""


def room_of(dense: Small, size_bytes: int) -> Room:
    """Bytes for table and keys."""
    return Room(size_bytes=size_bytes, storage=dense.storage, index=dense.index, keys=True)


def _header_guess(dense: Small, limit: int) -> int:
    """About the bytes of the header, rather more: escaped JSON, and a digest per MiB."""
    document = [dense.data.schema.to_json(), dense.model.lower().to_json(), dense.method.config()]
    return int(1.3 * len(canonical_json(document))) + 2048 + limit // CHUNK * 64


def fit_file(ladder: Ladder, dense: Small, limit: int) -> tuple[Small, Room]:
    """The largest table whose whole file takes at most ``limit`` bytes, to 0.1 %.

    Head and header hardly depend on the table: what they leave goes to table and vocabulary, and each trial knows them
    better than the one before.
    """
    goal = limit - _growth(dense)
    least = ladder.headed(dense.model, room_of(dense, 0))
    if least is dense.model:
        return _fit_beside(ladder, dense, limit, goal, goal - _header_guess(dense, goal))
    best = _fit_room(ladder, replace(dense, model=least), limit, 0)
    size = goal - best[0].sizes["header"] - _HEADER_DIGITS
    for _ in range(_HEADS):
        headed = replace(dense, model=ladder.headed(dense.model, room_of(dense, size)))
        other = _fit_beside(ladder, headed, limit, goal, size)
        waste = goal - other[0].sizes["file"]
        if waste >= 0 and other[0].sizes["file"] <= best[0].sizes["file"]:
            break
        best = other if waste >= 0 else best
        if 0 <= waste <= goal // 1000:
            break
        size += waste
    return best


def _fit_beside(ladder: Ladder, dense: Small, limit: int, goal: int, size: int) -> tuple[Small, Room]:
    """The largest table beside a head; together with the vocabulary they take about ``size`` bytes."""
    head = sum(t.nbytes for t in dense.model.lower().tensors().values())
    small, room = _fit_room(ladder, dense, limit, size - head)
    beside = _beside(small)
    while not 0 <= goal - small.sizes["file"] <= goal // 1000:
        last, (small, room) = small, _fit_room(ladder, dense, limit, goal - beside)
        if small.sizes["file"] <= goal and (_beside(small) <= beside or small.sizes == last.sizes):
            break
        beside = max(beside + 1, _beside(small))
    return small, room


def _fit_room(ladder: Ladder, dense: Small, limit: int, size: int) -> tuple[Small, Room]:
    """The largest table that fits with its vocabulary into ``size`` bytes, or else the smallest there is."""
    room = room_of(dense, size)
    try:
        return with_ladder_table(dense, ladder.table(room)), room
    except BudgetError as error:
        if error.least_bytes is None:
            raise
        room = replace(room, size_bytes=error.least_bytes)
        small = with_ladder_table(dense, ladder.table(room))
        named = replace(small, budget=Budget("bytes", small.sizes["file"]))
        if (least := max(small.sizes["file"], named.sizes["file"]) + _growth(dense)) > limit:
            raise BudgetError(
                f"Budget {limit:,} B is below the {least:,} B of the smallest file that {dense.method.name} can make "
                "of this model; raise the budget or choose a smaller head.",
                least_bytes=least,
            ) from error
        return small, room


def _growth(dense: Small) -> int:
    """Bytes by which the header may still grow where the head is trained again: a number takes up to 24 digits."""
    if not dense.method.trains:
        return 0
    numbers = [n for op in dense.model.lower().ops for n in op.attributes.values() if isinstance(n, float)]
    return sum(24 - len(canonical_json(n)) + 8 for n in numbers)


def _beside(small: Small) -> int:
    """Bytes of the file beside table and vocabulary."""
    return small.sizes["head"] + small.sizes["header"]


def with_ladder_table(small: Small, table: Table) -> Small:
    return replace(small, model=small.model.with_table(table))
