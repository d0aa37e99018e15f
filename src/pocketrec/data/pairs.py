"""How user-item pairs become ids: two dense fields, distinct pairs, splits per user.

Memory holds the distinct pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocketrec.data import splits
from pocketrec.data.source import Scan
from pocketrec.data.staging import save_array
from pocketrec.data.tally import RawFile, RowProgress, Tally
from pocketrec.errors import DataError
from pocketrec.schema import Field, Schema

_PAIR = np.dtype([("user", "<i8"), ("item", "<i8"), ("line", "<i8")])
_MOST_IDS = 2**30


def write_pairs(
    folder: Path,
    parts: list[tuple[RawFile, Scan]],
    *,
    users: int | None,
    items: int | None,
    test_fraction: Fraction,
    valid_fraction: Fraction,
    seed: int,
    tally: Tally,
    progress: RowProgress,
) -> tuple[Schema, list[str]]:
    """Encode user-item pairs into ``folder``: two dense fields, splits sorted by (user, item), duplicates dropped.

    Args:
        folder: an empty folder.
        parts: the raw files with their scans; ``train`` first.
        users: number of users, or ``None`` for 1 + the largest id.
        items: number of items, or ``None`` for 1 + the largest id.
        test_fraction: share of each user's pairs that is held out for testing, where no part is the test split.
        valid_fraction: the same for validation, drawn from what is left.
        seed: seed of both draws.
        tally: counts the rows.
        progress: told (what, rows done).

    Returns:
        The schema and remarks on the data.
    """
    pairs = {part.split or "train": _read_pairs(part, scan, tally, progress) for part, scan in parts}
    for later, name in enumerate(splits.NAMES):
        for earlier in splits.NAMES[:later]:
            if name in pairs and earlier in pairs:
                pairs[name] = _without(pairs[name], pairs[earlier], f"already in {earlier}", tally)
    for name, fraction in (("test", test_fraction), ("valid", valid_fraction)):
        if name not in pairs:
            held = splits.per_user(pairs["train"]["user"], fraction, seed, name)
            pairs[name], pairs["train"] = pairs["train"][held], pairs["train"][~held]
    sizes = {
        "user": _size("users", users, [int(p["user"].max()) for p in pairs.values() if len(p)]),
        "item": _size("items", items, [int(p["item"].max()) for p in pairs.values() if len(p)]),
    }
    user = Field("user", sizes["user"], 0, "dense", oov=False)
    item = Field("item", sizes["item"], user.stop, "dense", oov=False)
    schema = Schema("cf", (user, item))
    _save(folder, pairs, schema)
    return schema, _unseen(pairs, sizes)


def _save(folder: Path, pairs: Mapping[str, NDArray[np.void]], schema: Schema) -> None:
    """Write the ids and lines of every split, and how often each id occurs in training."""
    for name in splits.NAMES:
        ids = np.stack([pairs[name]["user"], pairs[name]["item"] + schema.fields[1].offset], axis=1).astype(np.int32)
        save_array(folder / f"{name}.ids.npy", ids)
        save_array(folder / f"{name}.rows.npy", pairs[name]["line"])
        if name == "train":
            save_array(folder / "counts.npy", np.bincount(ids.ravel(), minlength=schema.rows).astype(np.int64))


def _read_pairs(part: RawFile, scan: Scan, tally: Tally, progress: RowProgress) -> NDArray[np.void]:
    """Distinct pairs of one file, sorted by (user, item), each with the line of its first appearance."""
    chunks = []
    for batch in tally.batches(part.path, scan):
        chunk = np.empty(batch.frame.height, _PAIR)
        chunk["user"], chunk["item"] = batch.frame["user"].to_numpy(), batch.frame["item"].to_numpy()
        chunk["line"] = batch.lines
        chunks.append(chunk)
        progress("reading", tally.rows_in + batch.frame.height)
    pairs = np.concatenate(chunks) if chunks else np.empty(0, _PAIR)
    pairs = pairs[np.lexsort((pairs["item"], pairs["user"]))]
    repeated = np.zeros(len(pairs), bool)
    repeated[1:] = (pairs["user"][1:] == pairs["user"][:-1]) & (pairs["item"][1:] == pairs["item"][:-1])
    if repeated.any():
        tally.dropped["duplicate pair"] += int(repeated.sum())
    return pairs[~repeated]


def _without(pairs: NDArray[np.void], other: NDArray[np.void], reason: str, tally: Tally) -> NDArray[np.void]:
    known = np.isin(_key(pairs), _key(other))
    if known.any():
        tally.dropped[reason] += int(known.sum())
    return pairs[~known]


def _key(pairs: NDArray[np.void]) -> NDArray[np.int64]:
    return (pairs["user"] << 32) | pairs["item"]


def _size(name: str, given: int | None, largest: list[int]) -> int:
    needed = 1 + max(largest, default=-1)
    if given is not None and given < needed:
        raise DataError(f"`{name}` must be above the largest id, {needed - 1}, but got {given}.")
    if not needed or needed > _MOST_IDS:
        raise DataError(f"Expected between 1 and {_MOST_IDS:,} {name}, but the ids give {needed:,}.")
    return given or needed


def _unseen(pairs: Mapping[str, NDArray[np.void]], sizes: Mapping[str, int]) -> list[str]:
    notes = []
    for name in splits.NAMES[1:]:
        for column in ("user", "item"):
            seen = np.zeros(sizes[column], bool)
            seen[pairs["train"][column]] = True
            count = int((~seen[np.unique(pairs[name][column])]).sum())
            if count:
                notes.append(f"{count} {column}s of the {name} split never occur in training")
    return notes
