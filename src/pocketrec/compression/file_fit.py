"""The largest table whose whole file, head and vocabulary included, fits a budget of bytes."""

from __future__ import annotations

from dataclasses import replace

from pocketrec.compression.budget import Room
from pocketrec.compression.ladder import Ladder
from pocketrec.compression.small import Small
from pocketrec.errors import BudgetError
from pocketrec.format.artifact import CHUNK, DIGEST
from pocketrec.models.table import Table

_HEADS = 4
"""Heads that are tried where a file has room left."""

_ENTRIES, _GROWTH = 2048, 128
"""What a first trial leaves, at most: for what a header says of a table, and for what it says more of a larger one."""


def room_of(dense: Small, size_bytes: int) -> Room:
    """Bytes for table and keys."""
    return Room(size_bytes=size_bytes, storage=dense.storage, index=dense.index, keys=True)


def fit_file(ladder: Ladder, dense: Small, limit: int) -> tuple[Small, Room]:
    """The largest table whose whole file takes at most ``limit`` bytes, to 0.1 %.

    Head and header hardly depend on the table: what they leave goes to table and vocabulary, and each trial knows them
    better than the one before.
    """
    near = limit // 1000
    size = limit - limit // CHUNK * DIGEST
    least = ladder.headed(dense.model, room_of(dense, 0))
    if least is dense.model:
        return _fit_beside(ladder, dense, limit, size - dense.bare_header - _ENTRIES)
    best = _fit_room(ladder, replace(dense, model=least), limit, 0)
    size -= best[0].sizes["header"] + _GROWTH
    for _ in range(_HEADS):
        headed = replace(dense, model=ladder.headed(dense.model, room_of(dense, size)))
        try:
            other = _fit_beside(ladder, headed, limit, size)
        except BudgetError as error:
            size -= max(1, (error.least_bytes or limit) - limit)
            continue
        waste = limit - other[0].sizes["file"]
        if waste >= 0 and other[0].sizes["file"] <= best[0].sizes["file"]:
            break
        best = other if waste >= 0 else best
        if 0 <= waste <= near:
            break
        size += waste
    return best


def _fit_beside(ladder: Ladder, dense: Small, limit: int, size: int) -> tuple[Small, Room]:
    """The largest table beside a head; together with the vocabulary they take about ``size`` bytes."""
    head = sum(t.nbytes for t in dense.model.lower().tensors().values())
    small, room = _fit_room(ladder, dense, limit, size - head)
    beside = _beside(small)
    while not 0 <= limit - small.sizes["file"] <= limit // 1000:
        last, (small, room) = small, _fit_room(ladder, dense, limit, limit - beside)
        if small.sizes["file"] <= limit and (_beside(small) <= beside or small.sizes == last.sizes):
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
        if (least := small.sizes["file"]) > limit:
            raise BudgetError(
                f"Budget {limit:,} B is below the {least:,} B of the smallest file that {dense.method.name} can make "
                "of this model; raise the budget or choose a smaller head.",
                least_bytes=least,
            ) from error
        return small, room


def _beside(small: Small) -> int:
    """Bytes of the file beside table and vocabulary."""
    return small.sizes["head"] + small.sizes["header"]


def with_ladder_table(small: Small, table: Table) -> Small:
    """The same model around another table."""
    return replace(small, model=small.model.with_table(table))
