"""The encoded data set: a folder of ``.npy`` files and one ``dataset.json``, memory-mapped on open.

Ids are global table rows. Vocabulary and counts come from training rows (see :mod:`pocketrec.encoding.clicks`). Every
raw row that is not kept is counted by reason: ``rows_in == sum(len(split)) + sum(dropped.values())``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pocketrec.encoding.clicks import Counting, Order, write_clicks
from pocketrec.encoding.pairs import write_pairs
from pocketrec.encoding.splits import by_ratio, parse_fraction, parse_ratio
from pocketrec.encoding.staging import staged_folder
from pocketrec.encoding.tally import Part, Progress, Tally
from pocketrec.errors import ConfigError, DataError
from pocketrec.files import atomic_write, canonical_json, digest
from pocketrec.metrics import Wanted, to_csr
from pocketrec.schema import Schema
from pocketrec.source import Scan, Source, require_file

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

    @cached_property
    def wanted(self) -> Wanted:
        """Of ranking data: what users should find, which is this split, and what they have seen, which is training."""
        users, items = (field.size for field in self.dataset.schema.fields)
        seen, truth = (to_csr(s.ids[:, 0], s.ids[:, 1] - users, users) for s in (self.dataset.train, self))
        return Wanted.of(seen, truth, items)


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
        self.path = path
        self.document = document
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
        document = _read_document(path)
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


def encode(
    source: Source,
    raw: str | Path | None,
    out: str | Path,
    *,
    test: str | Path | None = None,
    valid: str | Path | None = None,
    valid_fraction: float | None = None,
    split: str = "8:1:1",
    threshold: int | Mapping[str, int] = 1,
    counting: Counting = "train",
    order: Order = "appearance",
    users: int | None = None,
    items: int | None = None,
    max_bad: float = 0.001,
    seed: int = 0,
    progress: Progress | None = None,
) -> Dataset:
    """Encode a raw log into the folder ``out`` and open it.

    The folder appears whole or not at all. Where it already holds the result of the same call on the same bytes, that
    is opened; where it holds anything else, nothing is touched.

    Args:
        source: the raw format, e.g. ``pocketrec.sources.Criteo()``; it names label and columns.
        raw: the raw file; ``None`` for a generator.
        out: folder to write.
        test: file of the test split.
        valid: file of the validation split.
        valid_fraction: share of the training file that validates, where ``test`` is given; ``cf``: of each user's pairs
            (``max(1, floor(n_u * share))``, at least one is left for training), default 0.1 there.
        split: weights of train, valid and test, where no file and no column decides; ``cf``: per user.
        threshold: least count of a value that gets an id of its own, for all fields or by field name, at least 1.
            ``dense`` fields keep the whole range of their integers; with more than 1 an ``integer`` field is hashed.
        counting: ``train`` counts training rows; ``published`` counts all rows, as the papers did (a leak).
        order: of ids: first ``appearance`` among the counted rows, or by ``count``, then string. Dense integer fields
            keep the order of their integers.
        users: ``cf``: number of users, at least 1 + the largest id (the default).
        items: ``cf``: number of items, likewise.
        max_bad: largest share of bad rows in one file, in [0, 1].
        seed: seed of the splits.
        progress: told (what, rows done).

    Raises:
        ConfigError: an argument is out of range, contradicts another, or ``out`` holds something else.
        DataError: the raw files do not hold what the source promises; nothing is written.

    Example:
        >>> import tempfile, pocketrec.sources
        >>> source = pocketrec.sources.Synthetic(rows=1000, cardinalities=(50, 20))
        >>> data = encode(source, None, Path(tempfile.mkdtemp()) / "clicks")
        >>> len(data.train), data.schema.rows
        (800, 72)
    """
    out = Path(out)
    options = {
        "valid_fraction": valid_fraction,
        "split": split,
        "threshold": threshold if isinstance(threshold, int) else dict(threshold),
        "counting": counting,
        "order": order,
        "users": users,
        "items": items,
        "max_bad": max_bad,
        "seed": seed,
    }
    _check(source, options, raw=raw, test=test, valid=valid)
    parts = _parts(raw, test=test, valid=valid, valid_fraction=valid_fraction)
    recipe = {
        "source": {"name": source.name, **asdict(source)},  # pyright: ignore[reportArgumentType]
        "raw": {p.split or "all": file_digest(require_file(p.path)) for p in parts if raw is not None},
        **options,
    }
    if (done := _finished(out, recipe, source)) is not None:
        return done
    tally = Tally(max_bad)
    tell = progress or (lambda what, rows: None)
    scans = _scans(source, parts)
    with staged_folder(out) as folder:
        if source.task == "cf":
            schema, notes = write_pairs(
                folder,
                scans,
                users=users,
                items=items,
                **_held_out(split, parts, valid_fraction),
                seed=seed,
                tally=tally,
                progress=tell,
            )
        else:
            ratio = _ratio(split, parts, valid_fraction)
            schema, notes = write_clicks(
                folder,
                scans,
                lambda rows: by_ratio(rows, ratio, seed),
                threshold=threshold,
                counting=counting,
                order=order,
                tally=tally,
                progress=tell,
            )
        _write_document(folder, schema, tally, notes, recipe)
    return Dataset.open(out)


def _check(source: Source, options: Mapping[str, Any], **files: str | Path | None) -> None:
    """Refuse arguments that are out of range or contradict each other."""
    for name, known in (("counting", get_args(Counting)), ("order", get_args(Order))):
        if options[name] not in known:
            raise ConfigError(f"`{name}` must be one of {', '.join(known)}, but got {options[name]!r}.")
    if not 0 <= options["max_bad"] <= 1:
        raise ConfigError(f"`max_bad` must be in [0, 1], but got {options['max_bad']}.")
    if options["seed"] < 0:
        raise ConfigError(f"`seed` must be at least 0, but got {options['seed']}.")
    foreign = [("threshold", 1)] if source.task == "cf" else [("users", None), ("items", None)]
    for name, default in foreign:
        if options[name] != default:
            raise ConfigError(f"`{name}` has no meaning for task {source.task!r}, but got {options[name]!r}.")
    if files["raw"] is None and not source.generates:
        raise ConfigError(f"Source {source.name!r} needs a raw file, but got None.")
    if files["valid"] is not None and options["valid_fraction"] is not None:
        raise ConfigError("`valid` and `valid_fraction` both decide what validates; give one of them.")
    if files["valid"] is not None and files["test"] is None:
        raise ConfigError("`valid` needs `test`: give both files, or split one file by seed.")
    if options["valid_fraction"] is not None and files["test"] is None:
        raise ConfigError("`valid_fraction` needs `test`; without it, `split` says all three shares.")


def _parts(
    raw: str | Path | None, *, test: str | Path | None, valid: str | Path | None, valid_fraction: float | None
) -> list[Part]:
    """The raw files, training rows first."""
    decided = test is not None and not valid_fraction
    parts = [Part(Path(raw or ""), "train" if decided else None)]
    for name, path in (("valid", valid), ("test", test)):
        if path is not None:
            parts.append(Part(Path(path), name))
    return parts


def _scans(source: Source, parts: list[Part]) -> list[tuple[Part, Scan]]:
    first = source.scan(parts[0].path)
    if first.split is not None and len(parts) > 1:
        raise ConfigError(f"Column {first.split!r} and the given files both decide the splits; give one of them.")
    return [(parts[0], first), *((part, source.scan(part.path, first.columns)) for part in parts[1:])]


def _ratio(split: str, parts: list[Part], valid_fraction: float | None) -> tuple[int, int, int]:
    """Weights of train, valid and test among the rows whose split is drawn."""
    if len(parts) == 1:
        return parse_ratio(split)
    share = parse_fraction("valid_fraction", valid_fraction or 0)
    return share.denominator - share.numerator, share.numerator, 0


def _held_out(split: str, parts: list[Part], valid_fraction: float | None) -> dict[str, Fraction]:
    """Shares of each user's pairs that are drawn for test and, of the rest, for validation."""
    if len(parts) == 1:
        train, valid, test = parse_ratio(split)
        return {
            "test_fraction": Fraction(test, train + valid + test),
            "valid_fraction": Fraction(valid, train + valid),
        }
    default = 0.1 if len(parts) == 2 else 0
    share = default if valid_fraction is None else valid_fraction
    return {"test_fraction": Fraction(0), "valid_fraction": parse_fraction("valid_fraction", share)}


def _finished(out: Path, recipe: Mapping[str, Any], source: Source) -> Dataset | None:
    """The data set in ``out`` if the same call made it; ``None`` if there is nothing or an empty folder.

    Settings that the source has gained since had their defaults then.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if (out / DOCUMENT).is_file():
        known = _read_document(out)["recipe"]
        settled = asdict(type(source)())  # pyright: ignore[reportArgumentType]
        if {**known, "source": {**settled, **known["source"]}} == json.loads(canonical_json(recipe)):
            return Dataset.open(out)
    raise ConfigError(f"{out} exists and was not made by this call; remove it or choose another folder.")


def _write_document(folder: Path, schema: Schema, tally: Tally, notes: list[str], recipe: Mapping[str, Any]) -> None:
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


def _read_document(path: Path) -> dict[str, Any]:
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
