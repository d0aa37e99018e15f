"""From scores to the exact set of entries that survive, for any budget.

Entries are ranked by a float32 key (largest kept, ties by index: the larger index is kept, as a stable ascending sort
that removes from the front does), so the sets of two budgets are nested. Keys are compared as ordered integers.
Selecting is a partition or a binary search over sorted keys: tenths of a second for tens of millions of entries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from pocketrec.compression.budget import Room, largest_fitting, values_below
from pocketrec.compression.ladder import Ladder, Method
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError, DivergedError
from pocketrec.families.sharing import BlockSharing
from pocketrec.format.block import side_size_for
from pocketrec.format.entries import size_for
from pocketrec.models.backbone import Model
from pocketrec.models.pruned import PrunedTable
from pocketrec.models.table import Block, Table, oov_rows
from pocketrec.schema import Schema
from pocketrec.training.run import Run

Fill = Literal["zero", "codebook", "plain"]
Floats = NDArray[np.float32]

INFINITE = np.int32(0x7F800000)
PROTECTED = np.int32(0x7FFFFFFF)
_NORMAL = np.int32(0x00800000)


def fill_rows(kind: Fill, weight: Floats, schema: Schema, counts: NDArray[np.int64]) -> Floats:
    """What a removed entry reads, per field: ``(F, D)``.

    ``zero``: zeros. ``codebook``: the frequency-weighted mean ``C_f = sum_i n_i e_i / sum_i n_i``, the minimiser of
    ``sum_i n_i |e_i - C_f|^2`` (zeros for a field that never occurs). ``plain``: the unweighted mean.
    """
    fill = np.zeros((schema.width, weight.shape[1]), np.float32)
    if kind == "zero":
        return fill
    for i, field in enumerate(schema.fields):
        rows = slice(field.offset, field.stop)
        share = counts[rows].astype(np.float64) if kind == "codebook" else np.ones(field.size)
        if (total := share.sum()) > 0:
            fill[i] = (share / total) @ weight[rows]
    return fill


def ordered(keys: Floats) -> NDArray[np.int32]:
    """Finite floats -> integers in the same order; 0.0 and -0.0 are equal."""
    if not np.isfinite(keys.sum(dtype=np.float64)):
        raise DivergedError("Ranking scores must be finite, but a score is NaN or infinite; train or score again.")
    bits = (keys + np.float32(0)).view(np.int32)
    return np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def rank_keys(*keys: NDArray[np.generic]) -> Floats:
    """Different finite float32 keys in the order of the last of ``keys (n, D)``, ties by the one before, then by index.

    Example:
        >>> a, b = np.array([[1.0, 3.0, 2.0]]), np.array([[0, 0, -1]])
        >>> rank_keys(a, b).argsort().tolist()
        [[2, 0, 1]]
    """
    order = np.lexsort([k.reshape(-1) for k in keys])
    bits = np.empty(len(order), np.int32)
    bits[order] = np.arange(len(order), dtype=np.int32) + _NORMAL
    return bits.view(np.float32).reshape(keys[0].shape)


def carry_uncounted(keys: Floats, blocks: Sequence[Block]) -> Floats:
    """Keys ``(n, D)`` in which an entry of an uncounted block goes with the last counted entry of its row."""
    counted = np.zeros(keys.shape, dtype=bool)
    for block in blocks:
        counted[block.start : block.stop, block.left : block.right] = block.counted
    best = np.max(keys, axis=1, where=counted, initial=-np.inf, keepdims=True)
    return np.where(counted, keys, best)


def largest(keys: NDArray[np.int32], count: int) -> NDArray[np.bool_]:
    """The ``count`` largest of ``keys (n,)``, ties to the larger index: bool ``(n,)``."""
    if count <= 0:
        return np.zeros(len(keys), dtype=bool)
    if count >= len(keys):
        return np.ones(len(keys), dtype=bool)
    threshold = np.partition(keys, len(keys) - count)[len(keys) - count]
    keep = keys > threshold
    ties = np.flatnonzero(keys == threshold)
    keep[ties[len(ties) - (count - np.count_nonzero(keep)) :]] = True
    return keep


def protect(keys: NDArray[np.int32], n_min: int) -> NDArray[np.int32]:
    """A copy in which the ``n_min`` largest keys of each row ``(n, d)`` rank above all others."""
    kept = np.argsort(keys, axis=1, kind="stable")[:, keys.shape[1] - n_min :]
    keys = keys.copy()
    np.put_along_axis(keys, kept, PROTECTED, axis=1)
    return keys


@dataclass(frozen=True)
class _Curve:
    """Sorted keys of what a file stores of one block: counts above any threshold in logarithmic time."""

    block: Block
    entries: NDArray[np.int32]
    rows: NDArray[np.int32]
    dense_rows: int
    hashed_rows: NDArray[np.int32]


@dataclass(frozen=True)
class _StoredCounts:
    """What a selection stores: per block (file rows, present rows, kept entries), and keys per hashed field."""

    blocks: tuple[tuple[int, int, int], ...]
    keys: tuple[int, ...]


@dataclass(frozen=True)
class PruningLadder(Ladder):
    """Every budget from one set of scores.

    Args:
        dense: The dense table; its matrix is shared, never copied.
        scores: Ranking key per entry, ``(n, D)`` float32: the largest survive.
        fill: What removed entries read, ``(F, D)``.
        counts: Training occurrences per row, ``(n,)``; they choose the absent rows.
        scope: ``joint`` ranks all counted blocks together, ``block`` gives each block its share (values only).
        n_min: Entries that each row of a counted block keeps at least.
    """

    dense: Table
    scores: Floats
    fill: Floats
    counts: NDArray[np.int64]
    scope: BlockSharing = "joint"
    n_min: int = 0

    def __post_init__(self) -> None:
        narrowest = min(b.width for b in self.dense.blocks if b.counted)
        if not 0 <= self.n_min <= narrowest:
            raise ConfigError(f"`n_min` must lie in [0, {narrowest}], but got n_min={self.n_min}.")

    @property
    def schema(self) -> Schema:
        """Fields of the table."""
        return self.dense.schema

    def table(self, room: Room) -> PrunedTable:
        """Exactly so many counted scalars, or the largest prefix of the ranking that packs into so many bytes.

        Values leave uncounted blocks whole. Bytes go over all blocks, and are met to 0.1 %.

        Raises:
            BudgetError: values are below what ``n_min`` asks for, or not even the least table fits.
        """
        return self._of_bytes(room) if room.values is None else self._of_values(room.values)

    def _of_values(self, values: int) -> PrunedTable:
        """Keep exactly ``values`` counted scalars; uncounted blocks stay whole."""
        counted = [b for b in self.dense.blocks if b.counted]
        keep = np.ones(self.scores.shape, dtype=bool)
        for group in [counted] if self.scope == "joint" else [[b] for b in counted]:
            count = values if self.scope == "joint" else _share(values, group[0], counted)
            least = self.n_min * sum(b.stop - b.start for b in group)
            if count < least:
                advice = "raise the budget or lower n_min."
                raise values_below(count, least, f"that n_min={self.n_min} asks for", advice)
            keys = [self._keys[b.name].reshape(-1) for b in group]
            chosen = largest(keys[0] if len(keys) == 1 else np.concatenate(keys), count)
            for block, part in zip(group, np.split(chosen, np.cumsum([b.values for b in group])[:-1]), strict=True):
                keep[block.start : block.stop, block.left : block.right] = part.reshape(-1, block.width)
        return self._kept(keep)

    def _of_bytes(self, room: Room) -> PrunedTable:
        """The largest prefix of the ranking, over all blocks, that packs into the room, to 0.1 %."""
        assumed = sum(f.oov_row is not None for f in self.schema.fields)
        table = self._fit(room, assumed)
        while (assumed - (own := _own_absent(table))) * (4 + 4 * table.width) > room.most // 1000:
            assumed, wider = own, self._fit(room, own)
            if _own_absent(wider) > own:
                break
            table = wider
        return table

    def _fit(self, room: Room, absent_fields: int) -> PrunedTable:
        """The largest selection that fits if ``absent_fields`` fields have an absent row of their own."""

        def size(counts: _StoredCounts) -> int:
            return self._size(counts, room, absent_fields)

        low, high = int(np.iinfo(np.int32).min), int(INFINITE)
        if (least := size(self._above(high))) > room.most:
            fields = f"{self.schema.width} fields of width {self.dense.width}"
            raise room.below(least, f"that the smallest pruned table of {fields} needs")
        if size(self._above(low)) <= room.most:
            high = low
        high = -largest_fitting(-high, -low, lambda key: size(self._above(-key)) <= room.most)
        keep = self._matrix > high
        self._add_ties(keep, high, size, room.most)
        return self._kept(keep)

    def _add_ties(
        self, keep: NDArray[np.bool_], threshold: int, size: Callable[[_StoredCounts], int], limit: int
    ) -> None:
        """Add entries whose key equals the threshold, from the last one on, as long as they fit."""
        ties = np.flatnonzero((self._matrix == threshold) & self._storable[:, None])[::-1]
        if not len(ties):
            return
        rows, columns = np.divmod(ties, keep.shape[1])
        base = self._above(threshold)
        fresh = _first(rows) & ~keep[rows].any(axis=1)
        steps = list(self._tie_steps(keep, rows, columns, fresh))
        field = self.schema.field_of_row[rows]

        def counts(added: int) -> _StoredCounts:
            blocks = tuple(
                (file_rows + int(new_file_rows[added]), present + int(new_rows[added]), kept + int(new_entries[added]))
                for (file_rows, present, kept), (new_file_rows, new_rows, new_entries) in zip(
                    base.blocks, steps, strict=True
                )
            )
            new_keys = np.bincount(field[:added][fresh[:added]], minlength=self.schema.width)
            return _StoredCounts(blocks, tuple(k + int(n) for k, n in zip(base.keys, new_keys, strict=True)))

        added = largest_fitting(0, len(ties), lambda added: size(counts(added)) <= limit)
        keep[rows[:added], columns[:added]] = True

    def _tie_steps(
        self, keep: NDArray[np.bool_], rows: NDArray[np.int64], columns: NDArray[np.int64], fresh: NDArray[np.bool_]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Per block, after each number of added ties: new file rows, new present rows, new entries."""
        hashed = self._hashed[rows]
        for block in self.dense.blocks:
            in_rows = (rows >= block.start) & (rows < block.stop)
            inside = in_rows & (columns >= block.left) & (columns < block.right)
            first = np.zeros(len(rows), dtype=bool)
            first[inside] = _first(rows[inside]) & ~keep[rows[inside], block.left : block.right].any(axis=1)
            yield _running(fresh & hashed & in_rows), _running(first), _running(inside)

    def _size(self, counts: _StoredCounts, room: Room, absent_fields: int) -> int:
        """Bytes of the packed table, and of its vocabulary if asked for."""
        fields = self.schema.width
        size = side_size_for(fields, self.dense.width, absent_fields)
        for block, (file_rows, present, kept) in zip(self.dense.blocks, counts.blocks, strict=True):
            size += size_for(file_rows, present, kept, block.width, fields, room.storage, room.index)
        return size + room.key_bytes(self.schema, counts.keys)

    def _above(self, threshold: int) -> _StoredCounts:
        """What keeping every key above the threshold stores."""
        blocks = tuple(
            (c.dense_rows + _above(c.hashed_rows, threshold), _above(c.rows, threshold), _above(c.entries, threshold))
            for c in self._curves
        )
        return _StoredCounts(blocks, tuple(_above(rows, threshold) for rows in self._field_rows))

    def _kept(self, keep: NDArray[np.bool_]) -> PrunedTable:
        base, fill = self.dense.weight().detach(), torch.from_numpy(self.fill)
        return PrunedTable.from_counts(self.schema, self.dense.blocks, base, torch.from_numpy(keep), fill, self.counts)

    @cached_property
    def _matrix(self) -> NDArray[np.int32]:
        """Ordered keys of all entries, ``(n, D)``."""
        keys = ordered(self.scores)
        for block in self.dense.blocks if self.n_min else ():
            if block.counted:
                part = keys[block.start : block.stop, block.left : block.right]
                part[...] = protect(part, self.n_min)
        return keys

    @cached_property
    def _keys(self) -> dict[str, NDArray[np.int32]]:
        """Ordered keys of each block, contiguous."""
        return {
            b.name: np.ascontiguousarray(self._matrix[b.start : b.stop, b.left : b.right]) for b in self.dense.blocks
        }

    @cached_property
    def _storable(self) -> NDArray[np.bool_]:
        """Rows that a file can store: all but the out-of-vocabulary rows."""
        return ~oov_rows(self.schema).numpy()

    @cached_property
    def _hashed(self) -> NDArray[np.bool_]:
        """Rows that need a key in the file's vocabulary."""
        of_field = np.array([f.keys == "hashed" for f in self.schema.fields])
        return of_field[self.schema.field_of_row] & self._storable

    @cached_property
    def _row_keys(self) -> NDArray[np.int32]:
        """Largest key of each row over all blocks."""
        keys = np.full(self.schema.rows, np.iinfo(np.int32).min, np.int32)
        for block in self.dense.blocks:
            rows = slice(block.start, block.stop)
            np.maximum(keys[rows], self._keys[block.name].max(axis=1), out=keys[rows])
        return keys

    @cached_property
    def _field_rows(self) -> tuple[NDArray[np.int32], ...]:
        """Sorted row keys of each field; dense fields keep all their rows."""
        every = np.full(1, PROTECTED, np.int32)
        return tuple(
            np.sort(self._row_keys[f.offset : f.stop - f.oov])
            if f.keys == "hashed"
            else np.repeat(every, f.size - f.oov)
            for f in self.schema.fields
        )

    @cached_property
    def _curves(self) -> tuple[_Curve, ...]:
        return tuple(self._curve(b) for b in self.dense.blocks)

    def _curve(self, block: Block) -> _Curve:
        rows = slice(block.start, block.stop)
        storable, hashed = self._storable[rows], self._hashed[rows]
        keys = self._keys[block.name][storable]
        return _Curve(
            block,
            np.sort(keys, axis=None),
            np.sort(keys.max(axis=1)),
            int((storable & ~hashed).sum()),
            np.sort(self._row_keys[rows][hashed]),
        )


def _own_absent(table: PrunedTable) -> int:
    """Fields whose absent row is not their fill row."""
    return int((table.absent != table.fill).any(dim=1).sum())


def _above(keys: NDArray[np.int32], threshold: int) -> int:
    """How many sorted keys are greater than the threshold."""
    return len(keys) - int(np.searchsorted(keys, np.int32(threshold), side="right"))


def _first(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each entry of a descending array is the first of its value."""
    return np.concatenate([np.ones(min(1, len(rows)), dtype=bool), rows[1:] != rows[:-1]])


def _running(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many of the first 0, 1, ... n flags are set."""
    return np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])


def _share(values: int, block: Block, counted: list[Block]) -> int:
    """The part of ``values`` that one block gets: proportional to its size, summing exactly to ``values``."""
    before = sum(b.values for b in counted[: counted.index(block)])
    total = sum(b.values for b in counted)
    return values * (before + block.values) // total - values * before // total


class ScoredMethod(Method):
    """A method that ranks the entries of the trained table by one number each.

    Args:
        fill: What removed entries read: the frequency-weighted field mean (``codebook``), the ``plain`` mean, ``zero``.
        scope: ``joint`` ranks all counted blocks together, ``block`` prunes each to the same share.
        n_min: Entries that each row keeps at least, ``0 <= n_min <= floor(d (1 - sparsity))``.
    """

    fill: Fill = "zero"
    scope: BlockSharing
    n_min: int = 0

    @abstractmethod
    def scores(self, weight: Floats, fill: Floats, data: Dataset, seed: int) -> Floats:
        """Scores of all entries ``(n, D)``; those of largest score are kept.

        Args:
            weight: the trained matrix, ``(n, D)``.
            fill: what removed entries read, ``(F, D)``.
            data: it has counted its rows.
            seed: of the run.
        """

    def prepare(self, model: Model, data: Dataset, run: Run) -> PruningLadder:
        """Score once."""
        weight = model.table.weight().detach().numpy()
        fill = fill_rows(self.fill, weight, data.schema, data.counts)
        scores = self.scores(weight, fill, data, run.seed)
        return PruningLadder(model.table, scores, fill, data.counts, self.scope, self.n_min)
