"""Checks that every source must pass; the lab holds a small raw file that the source reads."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import polars as pl

from pocketrec.data.dataset import Dataset
from pocketrec.data.encode import encode
from pocketrec.data.source import Batch, ColumnKind, Source
from pocketrec.errors import PocketRecError
from pocketrec.schema import Task
from pocketrec.testing.lab import Lab, refused, require, same, untouched_globals


def check_knows_its_task(source: Source, _lab: Lab) -> None:
    """The task is ``ctr`` or ``cf``."""
    require(source.task in get_args(Task), f"a task among {get_args(Task)}", source.task)


def check_columns_are_named_once(source: Source, lab: Lab) -> None:
    """There is at least one column, and no name comes twice."""
    names = [column.name for column in source.scan(_raw(source, lab)).columns]
    require(0 < len(names) == len(set(names)), "distinct column names", names)


def check_column_kinds_are_known(source: Source, lab: Lab) -> None:
    """Every column says how its values become ids."""
    kinds = {column.kind for column in source.scan(_raw(source, lab)).columns}
    require(kinds <= set(get_args(ColumnKind)), f"kinds among {get_args(ColumnKind)}", kinds)


def check_ranking_has_users_and_items(source: Source, lab: Lab) -> None:
    """Interactions have two columns and no label; clicks have a label."""
    scan = source.scan(_raw(source, lab))
    if source.task == "cf":
        require(len(scan.columns) == 2 and scan.label is None, "two columns, no label", f"{len(scan.columns)} columns")
    else:
        require(scan.label is not None, "a label column", scan.label)


def check_yields_rows(source: Source, lab: Lab) -> None:
    """The sample file has rows, and each has its line."""
    batches = _batches(source, lab)
    require(sum(b.frame.height for b in batches) > 0, "at least one row")
    for batch in batches:
        require(len(batch.lines) == batch.frame.height, f"{batch.frame.height} line numbers", len(batch.lines))


def check_frames_hold_the_columns(source: Source, lab: Lab) -> None:
    """Every batch has every column, and the label, split and teacher columns that the scan names."""
    scan = source.scan(_raw(source, lab))
    named = {c.name for c in scan.columns} | {n for n in (scan.label, scan.split, scan.teacher) if n}
    for batch in scan.batches:
        require(named <= set(batch.frame.columns), f"columns {sorted(named)}", batch.frame.columns)


def check_features_are_never_null(source: Source, lab: Lab) -> None:
    """An empty cell is a value; null is not."""
    names = [c.name for c in source.scan(_raw(source, lab)).columns]
    for batch in _batches(source, lab):
        holes = batch.frame.select(names).null_count().row(0)
        require(not any(holes), "no null in a feature column", dict(zip(names, holes, strict=True)))


def check_sized_columns_stay_in_range(source: Source, lab: Lab) -> None:
    """A column that promises ``0 .. size - 1`` keeps the promise."""
    sized = [c for c in source.scan(_raw(source, lab)).columns if c.size is not None]
    for batch in _batches(source, lab):
        for column in sized:
            low, high = batch.frame[column.name].min(), batch.frame[column.name].max()
            require(low >= 0 and high < column.size, f"{column.name} in [0, {column.size})", (low, high))  # type: ignore[operator]


def check_lines_go_up(source: Source, lab: Lab) -> None:
    """Line numbers start at 1 or later and rise from row to row; a line with several pairs may repeat."""
    lines = np.concatenate([b.lines for b in _batches(source, lab)])
    require(lines[0] >= 1 and bool((np.diff(lines) >= 0).all()), "line numbers that never fall", lines[:5])


def check_reads_the_same_twice(source: Source, lab: Lab) -> None:
    """Two scans of one file give the same rows."""
    one, other = (pl.concat([b.frame for b in _batches(source, lab)]) for _ in range(2))
    require(one.equals(other), "two scans to give the same rows")


def check_leaves_the_file_alone(source: Source, lab: Lab) -> None:
    """Reading changes no byte."""
    raw = _raw(source, lab)
    before = _digest(raw)
    _batches(source, lab)
    require(_digest(raw) == before, "the raw file to stay as it was")


def check_leaves_globals_alone(source: Source, lab: Lab) -> None:
    """Reading draws from no global generator."""
    with untouched_globals():
        _batches(source, lab)


def check_keeps_given_columns(source: Source, lab: Lab) -> None:
    """Another part of the data is read with the columns of the training file."""
    raw = _raw(source, lab)
    columns = source.scan(raw).columns
    require(source.scan(raw, columns).columns == columns, "the columns that were given")


def check_refuses_a_missing_file(source: Source, lab: Lab) -> None:
    """A file that is not there is a :class:`DataError`."""
    if not source.generates:
        with refused("a missing file"):
            _read(source, lab.place())


def check_refuses_an_empty_file(source: Source, lab: Lab) -> None:
    """A file of 0 bytes is a :class:`DataError`."""
    if not source.generates:
        empty = lab.place().with_suffix(_suffix(lab))
        empty.touch()
        with refused("an empty file"):
            _read(source, empty)


def check_refuses_a_folder(source: Source, lab: Lab) -> None:
    """A folder instead of a file is a :class:`DataError`."""
    if not source.generates:
        folder = lab.place()
        folder.mkdir()
        with refused("a folder"):
            _read(source, folder)


def check_survives_noise(source: Source, lab: Lab) -> None:
    """Random bytes give rows, bad rows or one of our errors: never another exception."""
    if source.generates:
        return
    for seed in range(3):
        noisy = lab.place().with_suffix(_suffix(lab))
        noisy.write_bytes(np.random.default_rng(seed).bytes(2000))
        _survives(source, noisy)


def check_survives_a_torn_file(source: Source, lab: Lab) -> None:
    """A file cut at any of four places gives rows, bad rows or one of our errors."""
    if source.generates or lab.raw is None:
        return
    whole = lab.raw.read_bytes()
    for part in (1, 4, 7, 9):
        torn = lab.place().with_suffix(lab.raw.suffix)
        torn.write_bytes(whole[: len(whole) * part // 10])
        _survives(source, torn)


def check_encodes(source: Source, lab: Lab) -> None:
    """The sample becomes a data set of the source's task that opens again."""
    data = _encoded(source, lab)
    require(data.schema.task == source.task, f"task {source.task!r}", data.schema.task)
    require(Dataset.open(data.path, verify=True).digest == data.digest, "the same digest when opened again")


def check_counts_every_row(source: Source, lab: Lab) -> None:
    """Rows read = rows kept + rows dropped, by reason."""
    data = _encoded(source, lab)
    kept = sum(len(split) for split in data.splits.values())
    dropped = sum(data.dropped.values())
    require(data.rows_in == kept + dropped, f"{data.rows_in} rows = kept + dropped", f"{kept} + {dropped}")


def check_encodes_alike_twice(source: Source, lab: Lab) -> None:
    """Encoding is a pure function of the bytes, the settings and the seed."""
    one, other = _encoded(source, lab), _encoded(source, lab)
    require(one.digest == other.digest, f"digest {one.digest[:12]} again", other.digest[:12])
    same("training ids", one.train.ids, other.train.ids)


def check_ids_lie_in_their_fields(source: Source, lab: Lab) -> None:
    """Every id lies in the range of its field, in every split."""
    data = _encoded(source, lab)
    low, high = data.schema.offsets[:-1], data.schema.offsets[1:]
    for name, split in data.splits.items():
        ids = np.asarray(split.ids)
        require(bool(((ids >= low) & (ids < high)).all()), f"ids of {name} to lie in their fields")


def check_does_not_mind_where_the_file_lies(source: Source, lab: Lab) -> None:
    """The digest depends on the bytes of the raw file, not on its folder."""
    if source.generates or lab.raw is None:
        return
    elsewhere = lab.place()
    elsewhere.mkdir()
    moved = Path(shutil.copy(lab.raw, elsewhere / lab.raw.name))
    other = encode(source, moved, lab.place())
    require(_encoded(source, lab).digest == other.digest, "the same digest from another folder")


def _raw(source: Source, lab: Lab) -> Path:
    if source.generates:
        return lab.folder
    require(lab.raw is not None, "the lab to hold a raw file: Lab(folder, raw=path)")
    return lab.raw  # type: ignore[return-value]


def _suffix(lab: Lab) -> str:
    return lab.raw.suffix if lab.raw is not None else ""


def _read(source: Source, raw: Path) -> list[Batch]:
    return list(source.scan(raw).batches)


def _batches(source: Source, lab: Lab) -> list[Batch]:
    return _read(source, _raw(source, lab))


def _encoded(source: Source, lab: Lab) -> Dataset:
    return encode(source, None if source.generates else _raw(source, lab), lab.place())


def _survives(source: Source, raw: Path) -> None:
    try:
        encode(source, raw, raw.with_suffix(".out"))
    except PocketRecError as error:
        require(len(str(error)) > 20, "a message that helps", repr(str(error)))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
