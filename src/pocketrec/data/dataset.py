"""The encoded data set: a folder of ``.npy`` files and one ``dataset.json``, memory-mapped on open.

Ids are global table rows. Vocabulary and counts come from training rows (see :mod:`pocketrec.data.clicks`). Every
raw row that is not kept is counted by reason: ``rows_in == sum(len(split)) + sum(dropped.values())``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pocketrec.data.tally import Tally
from pocketrec.errors import ConfigError, DataError
from pocketrec.evaluation.metrics import RankingTargets, to_csr
from pocketrec.files import atomic_write, canonical_json, digest
from pocketrec.format.vocabulary import file_order
from pocketrec.randomness import generator
from pocketrec.schema import Schema

SplitName = Literal["train", "valid", "test"]

FORMAT = 1

DOCUMENT = "dataset.json"


@dataclass(frozen=True)
class Split:
    """The rows of one split, memory-mapped.

    Attributes:
        name: ``train``, ``valid`` or ``test``.
        dataset: the data set it belongs to.
        ids: global ids, int32 ``(N, F)``; ``cf``: (user, U + item), sorted.
        labels: 0 or 1, float32 ``(N,)``; ``None`` for ``cf``.
        rows: 1-based line (parquet: row) of each row in its raw file, int64 ``(N,)``.
        teacher: logit of the known teacher, float32 ``(N,)``; ``None`` where there is none.
    """

    name: SplitName
    dataset: Dataset
    ids: NDArray[np.int32]
    labels: NDArray[np.float32] | None
    rows: NDArray[np.int64]
    teacher: NDArray[np.float32] | None

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)

    def halves(self, seed: int) -> tuple[Split, Split]:
        """The rows in two random parts, each in the order of the split: disjoint, together all, equal or 1 apart.

        A pure function of the split and the seed, for searches that learn from one part and judge by the other. Unlike
        the split, its halves are in memory.
        """
        order = generator(seed, "halves").permutation(len(self))
        middle = (len(self) + 1) // 2
        first, second = (self._part(np.sort(part)) for part in (order[:middle], order[middle:]))
        return first, second

    def _part(self, rows: NDArray[np.int64]) -> Split:
        """Some of the rows."""
        labels, teacher = (None if column is None else column[rows] for column in (self.labels, self.teacher))
        return replace(self, ids=self.ids[rows], labels=labels, rows=self.rows[rows], teacher=teacher)

    @cached_property
    def wanted(self) -> RankingTargets:
        """Of ranking data: what users should find, which is this split, and what they have seen, which is training."""
        users, items = (field.size for field in self.dataset.schema.fields)
        seen, truth = (to_csr(s.ids[:, 0], s.ids[:, 1] - users, users) for s in (self.dataset.train, self))
        return RankingTargets.of(seen, truth, items)


class Dataset:
    """An encoded data set; nothing is read into memory but its small document.

    Attributes:
        path: its folder.
        schema: the fields and their ranges of ids.
        digest: SHA-256 over schema, ids, labels, counts and vocabulary.
        rows_in: raw rows that were read.
        dropped: rows that were not kept, by reason.
        document: the whole ``dataset.json``.

    Example:
        >>> data = Dataset.open("data/criteo")  # doctest: +SKIP
        >>> data.train.ids.shape, data.schema.rows  # doctest: +SKIP
    """

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path, self.document = path, document
        self.schema = Schema.from_json(document["schema"])
        self.digest: str = document["digest"]
        self.rows_in: int = document["rows_in"]
        self.dropped: dict[str, int] = dict(document["dropped"])
        self.splits: dict[str, Split] = {n: self._split(n) for n in ("train", "valid", "test")}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Dataset:
        """Open the folder that ``encode`` wrote; ``verify`` also reads every byte and checks its digest.

        Raises:
            DataError: no data set there, a newer format, or a missing, short or changed file.
        """
        path = Path(path)
        document = read_description(path)
        for name, entry in document["files"].items():
            file = path / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise DataError(
                    f"{file}: expected {entry['bytes']} bytes, but {_found(file)}; encode the raw log again."
                )
            if verify and file_digest(file) != entry["sha256"]:
                raise DataError(f"{file}: expected digest {entry['sha256']}, but its bytes changed; encode again.")
        return cls(path, document)

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes a data set travels as the name of its folder."""
        return Dataset.open, (self.path.resolve(),)

    @property
    def train(self) -> Split:
        """Training rows; the only ones that vocabulary, counts and methods may read."""
        return self.splits["train"]

    @property
    def valid(self) -> Split:
        """Validation rows."""
        return self.splits["valid"]

    @property
    def test(self) -> Split:
        """Test rows."""
        return self.splits["test"]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Training rows (interactions) that read each table row, ``(rows,)``."""
        return self._array("counts")

    @cached_property
    def file_order(self) -> NDArray[np.int64]:
        """Every row, ``(rows,)``, as a file that stores all would lay them; out-of-vocabulary rows come last."""
        unknown = np.zeros(self.schema.rows, dtype=bool)
        unknown[[f.oov_row for f in self.schema.fields if f.oov_row is not None]] = True
        return np.concatenate([file_order(self.schema, ~unknown, self.hashes), np.flatnonzero(unknown)])

    def hashes(self, field: int) -> NDArray[np.uint64]:
        """``hash64`` of the raw string of each local id of a hashed field, ``(size - 1,)``: all but the OOV row."""
        self._require_hashed(field)
        return self._array(f"field{field:02d}.hashes")

    def values(self, field: int) -> list[str]:
        """The raw value of each local id of a field but its OOV row, in order."""
        spec = self.schema.fields[field]
        if spec.keys == "dense":
            return [str(v) for v in range(spec.first, spec.first + spec.size - spec.oov)]
        blob = self._array(f"field{field:02d}.values").tobytes()
        stops = self._array(f"field{field:02d}.stops").tolist()
        return [blob[start:stop].decode() for start, stop in pairwise([0, *stops])]

    def report(self) -> dict[str, Any]:
        """The document that ``pocketrec encode --json`` prints."""
        return {
            "dataset": str(self.path),
            "digest": self.digest,
            "rows": {name: len(split) for name, split in self.splits.items()},
            "dropped": self.dropped,
            "fields": [{"name": f.name, "cardinality": f.size, "keys": f.keys} for f in self.schema.fields],
            "notes": self.document["notes"],
        }

    def _require_hashed(self, field: int) -> None:
        if self.schema.fields[field].keys != "hashed":
            name = self.schema.fields[field].name
            raise ConfigError(f"Field {name!r} has dense integer keys and no hashes; use its `first` instead.")

    def _split(self, name: SplitName) -> Split:
        return Split(
            name=name,
            dataset=self,
            ids=self._array(f"{name}.ids"),
            labels=self._optional(f"{name}.labels"),
            rows=self._array(f"{name}.rows"),
            teacher=self._optional(f"{name}.teacher"),
        )

    def _optional(self, name: str) -> NDArray[Any] | None:
        return self._array(name) if f"{name}.npy" in self.document["files"] else None

    def _array(self, name: str) -> NDArray[Any]:
        path = self.path / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: expected an array, but got: {error}; encode the raw log again.") from error


def write_description(folder: Path, schema: Schema, tally: Tally, notes: list[str], recipe: Mapping[str, Any]) -> None:
    """Seal a folder: schema, digests of all files, and how it was encoded."""
    files = {f.name: {"bytes": f.stat().st_size, "sha256": file_digest(f)} for f in sorted(folder.iterdir())}
    content = {"format": FORMAT, "schema": schema.to_json(), "files": files}
    document = {
        **content,
        "digest": digest(content),
        "rows_in": tally.rows_in,
        "dropped": dict(tally.dropped),
        "notes": notes,
        "recipe": recipe,
    }
    atomic_write(folder / DOCUMENT, canonical_json({**document, "seal": digest(document)}))


def read_description(path: Path) -> dict[str, Any]:
    """What the folder of a data set says of itself; a damaged one raises :class:`DataError`."""
    file = path / DOCUMENT
    if not file.is_file():
        raise DataError(f"{path}: expected a folder that `encode` wrote, but there is no {DOCUMENT} in it.")
    try:
        document = json.loads(file.read_bytes())
        content = {key: document[key] for key in ("format", "schema", "files")}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: expected the document of a data set, but it is damaged ({error}).") from error
    if content["format"] != FORMAT:
        raise DataError(f"{file}: expected format {FORMAT}, but got {content['format']!r}; use a newer version.")
    if document.get("digest") != digest(content) or document.pop("seal", None) != digest(document):
        raise DataError(f"{file}: its digest does not match its content; encode the raw log again.")
    return document


def _found(file: Path) -> str:
    return f"got {file.stat().st_size}" if file.is_file() else "there is no such file"


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
