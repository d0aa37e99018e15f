"""Raw values -> rows of a file, in about 5 bytes per surviving string and none per dense integer. Torch-free.

In a file the rows of a table are renumbered ("file rows"), field by field: a dense-integer field keeps all its rows but
the out-of-vocabulary one, in order; a hashed field keeps only the rows that are stored at all, sorted by fingerprint.

A hashed field with ``m`` keys has ``2^b`` buckets, ``b = ceil(log2(m / 8))``. The fingerprint of a key is
``z = hash64(key) * multiplier mod 2^64``: its top ``b`` bits name the bucket, the next 32 bits are stored. Keys of all
hashed fields lie in one sorted array of remainders, and one directory says where each bucket starts. A look-up is a
binary search inside a bucket of about 4 to 8 remainders, straight on the memory-mapped arrays.

A value that the data set never held is taken for one that the file holds with probability at most
``(m / 2^b) * 2^-32``, that is below 1.9e-9 per look-up at any size (:meth:`Vocabulary.false_match_rate`). A value of
the data set that was pruned away is never mistaken: building tries another multiplier until all of them are absent.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, DataError
from pocketrec.schema import Field, Schema

KEYS_PER_BUCKET = 8
"""Most keys per bucket, on average."""

_ATTEMPTS = 64
_DECIMAL = re.compile(r"[+-]?[0-9]{1,20}", re.ASCII)
_GOLDEN = 0x9E3779B97F4A7C15
_REMAINDERS, _DIRECTORY = "vocabulary.remainders", "vocabulary.directory"


def hash64(values: Sequence[str]) -> NDArray[np.uint64]:
    """64-bit hashes of strings, shape ``(n,)``: BLAKE2b with an 8-byte digest of the UTF-8 text, little endian.

    Example:
        >>> hash64(["a", "b"]).tolist()
        [3405396810240292928, 8453121595177857668]
    """
    digests = b"".join(hashlib.blake2b(v.encode("utf-8", "surrogatepass"), digest_size=8).digest() for v in values)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64, copy=False)


@dataclass(frozen=True)
class Vocabulary:
    """Maps raw values, hashes and table rows to file rows; ``-1`` stands for absent.

    Attributes:
        schema: the fields.
        keys: number of file rows of each field, shape ``(F,)``.
        attempt: which multiplier mixes the hashes; above 0 only where two values of a field had one fingerprint.
        remainders: uint32, shape ``(hashed keys,)``.
        directory: uint32, shape ``(buckets + 1,)``; positions in ``remainders``.
    """

    schema: Schema
    keys: tuple[int, ...]
    attempt: int
    remainders: NDArray[np.uint32]
    directory: NDArray[np.uint32]

    @classmethod
    def build(
        cls, schema: Schema, stored: NDArray[np.bool_], hashes: Callable[[int], NDArray[np.uint64]]
    ) -> tuple[Vocabulary, NDArray[np.int64]]:
        """The vocabulary of the stored rows, and ``rows``: file row ``i`` holds table row ``rows[i]``.

        Args:
            schema: the fields.
            stored: shape ``(schema.rows,)``: rows of which anything is stored.
            hashes: for the index of a hashed field, :func:`hash64` of its values in local order, the
                out-of-vocabulary row left out.

        Raises:
            DataError: ``stored`` has another shape, or two values of one field have the same 64-bit hash.
        """
        order = _ordered(schema, stored, hashes)
        remainders, directory = _layout(order.words)
        return cls(schema, tuple(map(len, order.rows)), order.attempt, remainders, directory), order.joined()

    @property
    def rows(self) -> int:
        """Number of file rows, all fields together."""
        return sum(self.keys)

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays in the file."""
        return sum(a.nbytes for a in self.arrays().values())

    def false_match_rate(self, field: int) -> float:
        """Probability that a look-up takes an absent value of ``field`` for a present one; 0 for dense integers."""
        if self.schema.fields[field].keys == "dense":
            return 0.0
        return self.keys[field] / (1 << _bucket_bits(self.keys[field])) / 2**32

    def lookup(self, field: int, values: Sequence[Any] | NDArray[Any]) -> NDArray[np.int64]:
        """File rows of raw values of one field, shape ``(n,)``; ``-1`` for every unknown value.

        A dense field takes integers and their decimal text. A hashed field takes text as it was in the raw log, and
        integers, which stand for their decimal text. ``None`` is a missing cell, which raw logs write as empty text.

        Raises:
            DataError: a value is of another type.
        """
        if self.schema.fields[field].keys == "dense":
            return self._dense(field, values)
        return self.lookup_hashes(field, hash64([_text(v, self.schema.fields[field]) for v in values]))

    def lookup_row(self, values: Sequence[Any]) -> NDArray[np.int64]:
        """File rows ``(F,)`` of one raw value per field; see :meth:`lookup`."""
        rows = np.empty(len(values), dtype=np.int64)
        hashed = np.flatnonzero(self._hashed)
        if hashed.size:
            rows[hashed] = self.lookup_hashes(
                hashed, hash64([_text(values[i], self.schema.fields[i]) for i in hashed.tolist()])
            )
        for i in np.flatnonzero(~self._hashed).tolist():
            rows[i] = self._dense(i, [values[i]])[0]
        return rows

    def lookup_hashes(self, field: int | NDArray[np.int64], hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """File rows of values given by :func:`hash64`; ``field`` is one hashed field or one for each hash."""
        bits = self._bits[field]
        fingerprint = _mix(hashes, self.attempt)
        bucket = self._first_bucket[field] + _bucket(fingerprint, bits)
        low = self.directory[bucket].astype(np.int64)
        high = end = self.directory[bucket + 1].astype(np.int64)
        wanted = _remainder(fingerprint, bits)
        while (open_ := low < high).any():
            middle = (low + high) // 2
            below = open_ & (self.remainders[np.where(open_, middle, 0)] < wanted)
            low = np.where(below, middle + 1, low)
            high = np.where(open_ & ~below, middle, high)
        inside = low < end
        hit = inside & (self.remainders[np.where(inside, low, 0)] == wanted) if len(self.remainders) else inside
        return np.where(hit, low + self._shift[field], -1)

    def file_rows(self, hashes: Callable[[int], NDArray[np.uint64]], schema: Schema | None = None) -> NDArray[np.int64]:
        """File row of each table row, shape ``(schema.rows,)``; ``-1`` for absent rows.

        Args:
            hashes: as in ``build``.
            schema: the table's, if it is not the file's own; fields have the same names, but may have other values.

        Raises:
            DataError: the fields of ``schema`` are others, or are keyed in another way.
        """
        schema = self.schema if schema is None else schema
        here, there = ([(f.name, f.keys) for f in s.fields] for s in (self.schema, schema))
        if self.schema.task != schema.task or here != there:
            raise DataError(
                f"The file was made for {self.schema.task!r} data with fields {_told(here)}, but this data is "
                f"{schema.task!r} with {_told(there)}; use its own data."
            )
        result = np.full(schema.rows, -1, dtype=np.int64)
        for i, field in enumerate(schema.fields):
            named = _named(field)
            dense = field.keys == "dense"
            found = self.lookup(i, field.first + np.arange(named)) if dense else self.lookup_hashes(i, hashes(i))
            result[field.offset : field.offset + named] = found
        return result

    def fields(self) -> NDArray[np.int64]:
        """Field of each file row, shape ``(rows,)``."""
        return np.repeat(np.arange(len(self.keys)), self.keys)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` needs besides the arrays."""
        return {"attempt": self.attempt, "keys": list(self.keys)}

    def arrays(self) -> dict[str, NDArray[np.uint32]]:
        """The arrays of the file; none where every field is dense."""
        if all(f.keys == "dense" for f in self.schema.fields):
            return {}
        return {_REMAINDERS: self.remainders, _DIRECTORY: self.directory}

    @classmethod
    def from_json(cls, schema: Schema, document: Any, arrays: Mapping[str, NDArray[Any]]) -> Vocabulary:
        """Read what ``to_json`` and ``arrays`` wrote; nothing is unpacked.

        Raises:
            ArtifactError: the parts contradict each other.
        """
        try:
            keys, attempt = tuple(document["keys"]), document["attempt"]
            hashed = [i for i, f in enumerate(schema.fields) if f.keys == "hashed"]
            none = np.zeros(0, np.uint32)
            remainders = arrays[_REMAINDERS] if hashed else none
            directory = arrays[_DIRECTORY] if hashed else none
            sound = (
                set(document) == {"keys", "attempt"}
                and all(type(n) is int and 0 <= n <= _named(f) for n, f in zip(keys, schema.fields, strict=True))
                and all(n == _named(f) for n, f in zip(keys, schema.fields, strict=True) if f.keys == "dense")
                and type(attempt) is int
                and 0 <= attempt < _ATTEMPTS
                and remainders.dtype == directory.dtype == np.uint32
                and remainders.shape == (sum(keys[i] for i in hashed),)
                and directory.shape == ((sum(1 << _bucket_bits(keys[i]) for i in hashed) + 1,) if hashed else (0,))
            )
            sound = sound and (not hashed or _rises(directory, len(remainders)))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"The vocabulary is damaged ({error}); copy or export the file again.") from error
        if not sound:
            raise ArtifactError("The vocabulary contradicts the schema of its file; copy or export the file again.")
        return cls(schema, keys, attempt, remainders, directory)

    @cached_property
    def _bits(self) -> NDArray[np.uint64]:
        """Bits of the bucket's number, per field."""
        return np.array([_bucket_bits(n) for n in self.keys], dtype=np.uint64)

    @cached_property
    def _first_row(self) -> NDArray[np.int64]:
        """First file row of each field."""
        return _starts(np.array(self.keys, dtype=np.int64))

    @cached_property
    def _first_bucket(self) -> NDArray[np.int64]:
        """First bucket of each hashed field."""
        return _starts(np.where(self._hashed, 1 << self._bits.astype(np.int64), 0))

    @cached_property
    def _shift(self) -> NDArray[np.int64]:
        """File row minus position in ``remainders``, per hashed field."""
        return self._first_row - _starts(np.where(self._hashed, self.keys, 0))

    @cached_property
    def _hashed(self) -> NDArray[np.bool_]:
        """Which fields are hashed."""
        return np.array([f.keys == "hashed" for f in self.schema.fields])

    def _dense(self, field: int, values: Sequence[Any] | NDArray[Any]) -> NDArray[np.int64]:
        """File rows of integers: value ``first + i`` has row ``i`` of the field."""
        first, stop = self.schema.fields[field].first, self.schema.fields[field].first + self.keys[field]
        if not (isinstance(values, np.ndarray) and values.dtype.kind in "iu"):
            numbers = [_integer(v, self.schema.fields[field]) for v in values]
            inside = [n is not None and first <= n < stop for n in numbers]
            local = [n - first if n is not None and ok else 0 for n, ok in zip(numbers, inside, strict=True)]
            return np.where(inside, np.array(local, dtype=np.int64) + self._first_row[field], -1)
        known = (values >= first) & (values < stop)
        return np.where(known, np.where(known, values, first).astype(np.int64) - first + self._first_row[field], -1)


class _Order(NamedTuple):
    """Stored rows as a file has them: of every field its table rows, and of the hashed ones their words."""

    attempt: int
    rows: list[NDArray[np.int64]]
    words: list[NDArray[np.uint64]]

    def joined(self) -> NDArray[np.int64]:
        """All rows behind each other."""
        return np.concatenate(self.rows).astype(np.int64)


def file_order(
    schema: Schema, stored: NDArray[np.bool_], hashes: Callable[[int], NDArray[np.uint64]]
) -> NDArray[np.int64]:
    """Table row of each file row: ``rows`` of :meth:`Vocabulary.build`, and no vocabulary.

    Args:
        schema: the fields.
        stored: as in ``build``.
        hashes: as in ``build``.

    Raises:
        DataError: as in ``build``.
    """
    return _ordered(schema, stored, hashes).joined()


def _ordered(schema: Schema, stored: NDArray[np.bool_], hashes: Callable[[int], NDArray[np.uint64]]) -> _Order:
    """The stored rows by the first multiplier with which no fingerprint stands for two values."""
    if stored.shape != (schema.rows,):
        raise DataError(f"`stored` must have one entry for each of {schema.rows} rows, but has shape {stored.shape}.")
    kept = [stored[f.offset : f.offset + _named(f)] for f in schema.fields]
    hashed = {i: hashes(i) for i, f in enumerate(schema.fields) if f.keys == "hashed"}
    for attempt in range(_ATTEMPTS):
        parts = {i: part for i, h in hashed.items() if (part := _sort(h, kept[i], attempt)) is not None}
        if len(parts) == len(hashed):
            break
    else:
        raise DataError("Two values of one field have the same 64-bit hash; rename one of them.")
    rows = [f.offset + (parts[i][0] if i in parts else np.arange(_named(f))) for i, f in enumerate(schema.fields)]
    return _Order(attempt, rows, [words for _, words in parts.values()])


def _named(field: Field) -> int:
    """Values of a field that have a name of their own."""
    return field.size - field.oov


def _told(fields: Sequence[tuple[str, str]]) -> str:
    """Fields by name and keys, for people."""
    return ", ".join(f"{name} ({keys})" for name, keys in fields)


def _starts(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each part begins if the parts lie behind each other."""
    return np.cumsum(counts) - counts


def size_for(schema: Schema, keys: Sequence[int]) -> int:
    """Bytes of the arrays in the file, from the number of stored keys of each field, ``(F,)``.

    Example:
        >>> size_for(Schema("ctr", (Field("city", size=100, offset=0),)), [60])
        276
    """
    hashed = [n for n, field in zip(keys, schema.fields, strict=True) if field.keys == "hashed"]
    return 4 * sum(hashed) + 4 * (sum(1 << _bucket_bits(n) for n in hashed) + 1) if hashed else 0


def _bucket_bits(keys: int) -> int:
    """``ceil(log2(keys / KEYS_PER_BUCKET))``, at least 0."""
    return max(-(-keys // KEYS_PER_BUCKET) - 1, 0).bit_length()


def _mix(hashes: NDArray[np.uint64], attempt: int) -> NDArray[np.uint64]:
    """Fingerprints: an odd multiplier permutes the 64-bit words; powers spread close words differently each attempt."""
    return hashes * np.uint64(pow(_GOLDEN, attempt + 1, 2**64))


def _bucket(fingerprint: NDArray[np.uint64], bits: NDArray[np.uint64] | np.uint64) -> NDArray[np.int64]:
    """The top ``bits`` bits."""
    return (fingerprint >> np.uint64(32) >> (np.uint64(32) - bits)).astype(np.int64)


def _remainder(fingerprint: NDArray[np.uint64], bits: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint32]:
    """The 32 bits below the bucket's."""
    return ((fingerprint << bits) >> np.uint64(32)).astype(np.uint32)


def _sort(
    hashes: NDArray[np.uint64], kept: NDArray[np.bool_], attempt: int
) -> tuple[NDArray[np.int64], NDArray[np.uint64]] | None:
    """The kept values of a field by rising word, and their words: bucket and remainder, 32 bits the latter.

    ``None`` where a kept value shares its word with another value of the field, kept or not.
    """
    words = _mix(hashes, attempt) >> np.uint64(32 - _bucket_bits(int(kept.sum())))
    order = np.argsort(words)
    words, kept = words[order], kept[order]
    if ((words[1:] == words[:-1]) & (kept[1:] | kept[:-1])).any():
        return None
    return order[kept], words[kept]


def _layout(words: Sequence[NDArray[np.uint64]]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Remainders of all hashed fields behind each other, and where each bucket starts."""
    if not words:
        return np.zeros(0, np.uint32), np.zeros(0, np.uint32)
    buckets = [(w >> np.uint64(32)).astype(np.int64) for w in words]
    counts = [np.bincount(b, minlength=1 << _bucket_bits(len(b))) for b in buckets]
    directory = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return np.concatenate(words).astype(np.uint32), directory.astype(np.uint32)


def _rises(directory: NDArray[np.uint32], last: int) -> bool:
    """Whether the directory starts at 0, never falls and ends at ``last``."""
    return directory[0] == 0 and directory[-1] == last and bool((directory[1:] >= directory[:-1]).all())


def _text(value: Any, field: Field) -> str:
    """The text that a value stands for."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return str(_whole(value, field))


def _integer(value: Any, field: Field) -> int | None:
    """The integer that a value stands for, or ``None`` if it stands for none."""
    if value is None:
        return None
    if isinstance(value, str):
        return int(value) if _DECIMAL.fullmatch(value) else None
    return _whole(value, field)


def _whole(value: Any, field: Field) -> int:
    """An integer of Python or numpy."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise DataError(
            f"Field {field.name!r} takes text as in the raw log, integers or None, "
            f"but got {value!r} of type {type(value).__name__}; convert it first."
        )
    return int(value)
