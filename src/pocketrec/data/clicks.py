"""How the rows of a click log become ids.

1. One pass over the raw rows gives every distinct string of a field a provisional code, in order of appearance, and
   writes fixed-size records (codes, label, line) to a scratch file. Labels are checked here.
2. Records are assigned to splits; training counts and first appearances are taken per code.
3. Codes that are counted often enough get ids, all others the out-of-vocabulary id, the last of the field.
4. The records are written out as arrays, split by split.

Memory holds the distinct values and one chunk of rows, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pocketrec.data import splits
from pocketrec.data.source import BATCH_ROWS, Batch, Column, Scan
from pocketrec.data.staging import appending, array_file, save_array
from pocketrec.data.tally import RawFile, RowProgress, Tally
from pocketrec.errors import ConfigError, DataError
from pocketrec.format.vocabulary import hash64
from pocketrec.schema import Field, Schema

Counting = Literal["train", "published"]
IdOrder = Literal["appearance", "count"]
Assign = Callable[[int], Callable[[NDArray[np.int64]], NDArray[np.uint8]]]

_LABELS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0, "False": 0.0, "True": 1.0}
_LEAST_OCCUPANCY = 0.5
_MOST_ROWS = 2**31 - 1

UNDECIDED = 3
"""Code of a row whose split is drawn, in a record."""


class Interner:
    """Provisional codes of one column's values: 0, 1, 2, ... in order of appearance.

    The strings are held by polars for as long as one series of their type lives: the anchor.
    """

    def __init__(self, column: Column) -> None:
        self.column = column
        self._categories = pl.Categories.random()
        self._dtype = pl.Categorical(self._categories)
        self._anchor = pl.Series([], dtype=self._dtype)

    def codes(self, cells: pl.Series) -> NDArray[np.uint32]:
        """Codes of a batch of cells; integers of a known range are their own codes."""
        if self.column.size is not None:
            return cells.to_numpy().astype(np.uint32)
        return cells.cast(self._dtype).to_physical().to_numpy()

    def __len__(self) -> int:
        """Number of codes given."""
        return self.column.size if self.column.size is not None else len(self.strings())

    def strings(self) -> pl.Series:
        """The string of each code; only for columns of strings."""
        return self._categories.to_series()


class ScratchFile:
    """The scratch file of encoded rows: codes, label, line, split (3: undecided) and, if there is one, teacher."""

    def __init__(self, path: Path, width: int, *, teacher: bool) -> None:
        self.path = path
        self.undecided = 0
        self.dtype = np.dtype([
            ("codes", "<u4", (width,)), ("label", "<f4"), ("line", "<i8"), ("split", "u1"),
            *([("teacher", "<f4")] if teacher else []),
        ])  # fmt: skip

    def chunks(self, assign: Assign) -> Iterator[NDArray[np.void]]:
        """All records in order, a bounded number at a time, each with its split."""
        decide, position = assign(self.undecided), 0
        with self.path.open("rb") as file:
            while (chunk := np.fromfile(file, self.dtype, BATCH_ROWS)).size:
                open_rows = np.flatnonzero(chunk["split"] == UNDECIDED)
                chunk["split"][open_rows] = decide(np.arange(position, position + len(open_rows)))
                position += len(open_rows)
                yield chunk


@dataclass(frozen=True)
class ColumnCounts:
    """Per column and code: training rows, rows that decide on an id, and the first of these (-1: none)."""

    train: list[NDArray[np.int64]]
    deciding: list[NDArray[np.int64]]
    first: list[NDArray[np.int64]]
    rows: NDArray[np.int64]
    positives: NDArray[np.int64]


def write_clicks(
    folder: Path,
    parts: list[tuple[RawFile, Scan]],
    assign: Assign,
    *,
    threshold: int | Mapping[str, int],
    counting: Counting,
    order: IdOrder,
    tally: Tally,
    progress: RowProgress,
) -> tuple[Schema, list[str]]:
    """Encode a click log into ``folder``.

    Args:
        folder: an empty folder.
        parts: the raw files with their scans; all have the columns of the first.
        assign: from the number of rows of undecided split to the split of each of them, by position.
        threshold: least count of a value that gets an id, for all fields or by field name.
        counting: count over training rows, or (``published``, a leak) over all rows.
        order: of ids within a field: first appearance, or count (descending) then string.
        tally: counts the rows.
        progress: told (what, rows done).

    Returns:
        The schema and remarks on the data.
    """
    columns = parts[0][1].columns
    least = _thresholds(columns, threshold)
    interners = [Interner(c) for c in columns]
    records = _intern(folder / "records", parts, interners, tally, progress)
    counts = _count(records, assign, [len(i) for i in interners], counting, progress)
    schema, id_of_code = _number(folder, interners, counts, least, order)
    _write_counts(folder, schema, id_of_code, counts.train)
    _write_splits(folder, records, assign, id_of_code, counts.rows, progress)
    records.path.unlink()
    return schema, _remarks(counts)


def _thresholds(columns: tuple[Column, ...], threshold: int | Mapping[str, int]) -> list[int]:
    if isinstance(threshold, int):
        threshold = dict.fromkeys((c.name for c in columns), threshold)
    for name, value in threshold.items():
        if name not in {c.name for c in columns}:
            raise ConfigError(f"`threshold` must name fields of the data, but got {name!r}.")
        if value < 1:
            raise ConfigError(f"`threshold` must be at least 1, but got {value} for field {name!r}.")
    return [threshold.get(c.name, 1) for c in columns]


def _intern(
    path: Path, parts: list[tuple[RawFile, Scan]], interners: list[Interner], tally: Tally, progress: RowProgress
) -> ScratchFile:
    records = ScratchFile(path, len(interners), teacher=parts[0][1].teacher is not None)
    with appending(path) as file:
        for part, scan in parts:
            for batch in tally.batches(part.path, scan):
                record = np.empty(batch.frame.height, records.dtype)
                for f, interner in enumerate(interners):
                    record["codes"][:, f] = interner.codes(batch.frame[interner.column.name])
                record["label"] = _labels(batch, scan, part.path)
                record["line"] = batch.lines
                record["split"] = _splits(batch, scan, part)
                if scan.teacher is not None:
                    record["teacher"] = batch.frame[scan.teacher].to_numpy()
                records.undecided += int((record["split"] == UNDECIDED).sum())
                file.write(record.tobytes())
                progress("reading", tally.rows_in + batch.frame.height)
    return records


def _labels(batch: Batch, scan: Scan, path: Path) -> NDArray[np.float32]:
    """Labels as 0.0 and 1.0; anything else stops the encoding with its line."""
    if scan.label is None:
        raise ConfigError("A source of task 'ctr' must name its label column, but this one names none.")
    cells = batch.frame[scan.label].cast(pl.String)
    labels = cells.replace_strict(_LABELS, default=None, return_dtype=pl.Float32)
    if labels.null_count():
        row = int(labels.is_null().arg_max() or 0)
        raise DataError(
            f"{path}:{batch.lines[row]}: label {scan.label!r} must be 0 or 1, but got {cells[row]!r}; "
            "make the labels binary before encoding."
        )
    return labels.to_numpy()


def _splits(batch: Batch, scan: Scan, part: RawFile) -> NDArray[np.uint8]:
    """The code of each row's split, from the part or from the split column."""
    if scan.split is None or part.split is not None:
        code = UNDECIDED if part.split is None else splits.NAMES.index(part.split)
        return np.full(batch.frame.height, code, np.uint8)
    cells = batch.frame[scan.split]
    codes = cells.replace_strict({n: i for i, n in enumerate(splits.NAMES)}, default=None, return_dtype=pl.UInt8)
    if codes.null_count():
        row = int(codes.is_null().arg_max() or 0)
        raise DataError(
            f"{part.path}:{batch.lines[row]}: column {scan.split!r} must say train, valid or test, "
            f"but got {cells[row]!r}."
        )
    return codes.to_numpy()


def _count(
    records: ScratchFile, assign: Assign, sizes: list[int], counting: Counting, progress: RowProgress
) -> ColumnCounts:
    train = [np.zeros(n, np.int64) for n in sizes]
    deciding = train if counting == "train" else [np.zeros(n, np.int64) for n in sizes]
    first = [np.full(n, -1, np.int64) for n in sizes]
    rows, positives = np.zeros(3, np.int64), np.zeros(3, np.int64)
    seen = 0
    for chunk in records.chunks(assign):
        rows += np.bincount(chunk["split"], minlength=3)
        positives += np.bincount(chunk["split"], weights=chunk["label"], minlength=3).astype(np.int64)
        training = chunk["codes"][chunk["split"] == 0]
        decisive = training if counting == "train" else chunk["codes"]
        for f in range(len(sizes)):
            _tally_codes(train[f], training[:, f])
            if deciding[f] is not train[f]:
                _tally_codes(deciding[f], decisive[:, f])
            fresh = np.flatnonzero(first[f][decisive[:, f]] < 0)[::-1]
            first[f][decisive[fresh, f]] = seen + fresh
        seen += len(decisive)
        progress("counting", int(rows.sum()))
    if not rows[0]:
        raise DataError(f"Expected training rows, but the split leaves none of {int(rows.sum()):,} rows for training.")
    return ColumnCounts(train, deciding, first, rows, positives)


def _tally_codes(counts: NDArray[np.int64], codes: NDArray[np.uint32]) -> None:
    if len(counts) <= 4 * len(codes):
        counts += np.bincount(codes, minlength=len(counts))
    else:
        values, times = np.unique(codes, return_counts=True)
        counts[values] += times


def _number(
    folder: Path, interners: list[Interner], counts: ColumnCounts, least: list[int], order: IdOrder
) -> tuple[Schema, list[NDArray[np.int32]]]:
    """Fields and, per column, the global id of each code; vocabularies of hashed fields are written on the way."""
    fields: list[Field] = []
    id_of_code: list[NDArray[np.int32]] = []
    offset = 0
    for f, interner in enumerate(interners):
        kept = np.flatnonzero(counts.deciding[f] >= least[f])
        field, ids = _dense_field(interner, kept, least[f], offset) or _hashed_field(
            folder, f, interner, _ordered(interner, kept, counts, f, order), offset
        )
        offset = field.stop
        fields.append(field)
        id_of_code.append(ids)
    return Schema("ctr", tuple(fields)), id_of_code


def _ordered(
    interner: Interner, kept: NDArray[np.int64], counts: ColumnCounts, f: int, order: IdOrder
) -> NDArray[np.int64]:
    if order == "appearance":
        return kept[np.argsort(counts.first[f][kept], kind="stable")]
    by_string = np.argsort(interner.strings().to_numpy()[kept], kind="stable")
    by_count = np.argsort(-counts.deciding[f][kept][by_string], kind="stable")
    return kept[by_string[by_count]]


def _dense_field(
    interner: Interner, kept: NDArray[np.int64], least: int, offset: int
) -> tuple[Field, NDArray[np.int32]] | None:
    """The field without a vocabulary, where its column asks for one and its values allow it."""
    column = interner.column
    if column.size is not None:
        field = _fitting(Field(column.name, column.size + 1, offset, "dense", 0))
        return field, np.arange(offset, offset + column.size, dtype=np.int32)
    if column.kind not in ("integer", "dense") or not len(kept) or (column.kind == "integer" and least > 1):
        return None
    strings = interner.strings()
    numbers = strings.cast(pl.Int64, strict=False)
    whole = (numbers.cast(pl.String) == strings).fill_null(False).to_numpy()
    if not whole[kept].all():
        return None
    values = numbers.fill_null(0).to_numpy()
    low, high = int(values[kept].min()), int(values[kept].max())
    if column.kind == "integer" and len(kept) < _LEAST_OCCUPANCY * (high - low + 1):
        return None
    field = Field(column.name, high - low + 2, offset, "dense", low)
    if field.stop > _MOST_ROWS:
        raise DataError(f"Field {column.name!r}: its integers span {high - low + 1:,} ids; call it a `category`.")
    inside = whole & (values >= low) & (values <= high)
    return field, np.where(inside, values - low + offset, field.stop - 1).astype(np.int32)


def _fitting(field: Field) -> Field:
    """The field itself, if its rows can be counted."""
    if field.stop > _MOST_ROWS:
        raise DataError(f"Expected at most {_MOST_ROWS:,} table rows, but got {field.stop:,}; raise `threshold`.")
    return field


def _hashed_field(
    folder: Path, f: int, interner: Interner, codes: NDArray[np.int64], offset: int
) -> tuple[Field, NDArray[np.int32]]:
    """The field with a vocabulary: local id ``i`` is the value of ``codes[i]``."""
    field = _fitting(Field(interner.column.name, len(codes) + 1, offset, "hashed"))
    ids = np.full(len(interner), field.stop - 1, np.int32)
    ids[codes] = np.arange(offset, offset + len(codes), dtype=np.int32)
    _write_vocabulary(folder, f, interner.strings().gather(codes))
    return field, ids


def _write_vocabulary(folder: Path, f: int, strings: pl.Series) -> None:
    """The strings of a field as one UTF-8 text with the end of each, and their hashes."""
    stops = np.cumsum(strings.str.len_bytes().to_numpy(), dtype=np.int64)
    size_bytes = int(stops[-1]) if len(stops) else 0
    save_array(folder / f"field{f:02d}.stops.npy", stops)
    with (
        array_file(folder / f"field{f:02d}.values.npy", np.dtype(np.uint8), (size_bytes,)) as values,
        array_file(folder / f"field{f:02d}.hashes.npy", np.dtype(np.uint64), (len(strings),)) as hashes,
    ):
        for part in strings.to_frame().iter_slices(BATCH_ROWS):
            texts = part.to_series().to_list()
            values.write("".join(texts).encode())
            hashes.write(hash64(texts).tobytes())


def _write_counts(
    folder: Path, schema: Schema, id_of_code: list[NDArray[np.int32]], train: list[NDArray[np.int64]]
) -> None:
    counts = np.zeros(schema.rows, np.int64)
    for ids, times in zip(id_of_code, train, strict=True):
        np.add.at(counts, ids, times)
    save_array(folder / "counts.npy", counts)


def _write_splits(
    folder: Path,
    records: ScratchFile,
    assign: Assign,
    id_of_code: list[NDArray[np.int32]],
    rows: NDArray[np.int64],
    progress: RowProgress,
) -> None:
    kinds = {"ids": np.dtype(np.int32), "labels": np.dtype(np.float32), "rows": np.dtype(np.int64)}
    if "teacher" in (records.dtype.names or ()):
        kinds["teacher"] = np.dtype(np.float32)
    done = 0
    with ExitStack() as stack:
        files = {
            (s, kind): stack.enter_context(
                array_file(folder / f"{name}.{kind}.npy", dtype, (int(rows[s]), *([width] if kind == "ids" else [])))
            )
            for width in [len(id_of_code)]
            for s, name in enumerate(splits.NAMES)
            for kind, dtype in kinds.items()
        }
        for chunk in records.chunks(assign):
            ids = np.stack([m[chunk["codes"][:, f]] for f, m in enumerate(id_of_code)], axis=1)
            columns = {"ids": ids, "labels": chunk["label"], "rows": chunk["line"]}
            if "teacher" in kinds:
                columns["teacher"] = chunk["teacher"]
            for (s, kind), file in files.items():
                file.write(columns[kind][chunk["split"] == s].tobytes())
            done += len(chunk)
            progress("writing", done)


def _remarks(counts: ColumnCounts) -> list[str]:
    empty = [f"the {name} split is empty" for name, rows in zip(splits.NAMES, counts.rows, strict=True) if not rows]
    return empty + [
        f"every label of the {name} split is {'1' if positives else '0'}"
        for name, rows, positives in zip(splits.NAMES, counts.rows, counts.positives, strict=True)
        if rows and positives in (0, rows)
    ]
