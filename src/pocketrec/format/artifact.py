"""One file: packed table, vocabulary and head. Torch-free.

The file is safetensors; all metadata is the one header key ``pocketrec``, canonical JSON, so the same contents are the
same bytes. Three kinds of digest guard it: ``header``, checked on open; one per ``CHUNK`` bytes of the payload, checked
the first time that a part (vocabulary, table, head) lying in the chunk is asked for; and ``file``, the SHA-256 of the
whole file, checked by :meth:`Artifact.verify`. In all of them the digits of ``file`` and ``header`` count as zeros.
Opening reads the header only and unpacks nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, get_args

from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, PocketRecError
from pocketrec.files import atomic_write
from pocketrec.format.arrays import Extent, buffer, header, map_file, parse_header, view_arrays
from pocketrec.format.packed import Packed
from pocketrec.format.program import Program
from pocketrec.format.vocabulary import Vocabulary
from pocketrec.schema import Field, Keys, Schema

FileKind = Literal["ctr", "baked", "ego"]
"""``ctr``: click model; ``baked``: final user and item vectors; ``ego``: a ranking table before its propagation."""

FORMAT = 2
"""Version of the format that this package writes; it reads all versions up to this one."""

CHUNK = 1 << 20
"""Bytes of payload under one digest."""

DIGEST = 64
"""Bytes of a digest in the header."""

_ZEROS = "0" * DIGEST
_LEAD = rb'{"__metadata__":{"pocketrec":"{\"checks\":{\"file\":\"'
_BETWEEN = rb"\",\"header\":\""
_FILE = slice(8 + len(_LEAD), 8 + len(_LEAD) + 64)
_HEADER = slice(_FILE.stop + len(_BETWEEN), _FILE.stop + len(_BETWEEN) + 64)
_KEYS = {"checks", "chunks", "format", "head", "info", "kind", "schema", "table", "vocabulary"}
_PARTS = ("table", "vocabulary", "head")
_T = TypeVar("_T")
_BROKEN = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Contents:
    """What goes into a file.

    Attributes:
        kind: what the file can do.
        schema: fields of the raw rows.
        vocabulary: raw values -> file rows.
        packed: file rows -> vectors.
        program: vectors -> logits or scores.
        info: any JSON document on how the file came about; no time, host or path belongs into it.
        blank: spaces behind the header, in place of digits that a number in ``info`` might have had.
    """

    kind: FileKind
    schema: Schema
    vocabulary: Vocabulary
    packed: Packed
    program: Program
    info: Mapping[str, Any]
    blank: int = 0

    def sizes(self) -> dict[str, int]:
        """Bytes of the file and of its parts, which sum to ``file``; nothing is written or hashed."""
        arrays = self._arrays()
        chunks = -(-sum(a.nbytes for a in arrays.values()) // CHUNK)
        prefix, _ = header(arrays, self._meta(_ZEROS * chunks), self.blank)
        return _sizes(len(prefix), {name: a.nbytes for name, a in arrays.items()})

    def write(self, path: str | Path) -> dict[str, int]:
        """Write the file atomically and return its :meth:`sizes`; the same contents give the same bytes.

        Raises:
            ConfigError: ``info`` is not JSON, or the header grows too long.
            StorageError: the file system refused; an older file of the same name is intact.
        """
        arrays = self._arrays()
        _, order = header(arrays, None)
        payload = [buffer(arrays[name]) for name in order]
        prefix, _ = header(arrays, self._meta("".join(_chunk_digests(payload))), self.blank)
        signed = bytearray(prefix)
        signed[_HEADER] = _sha256([prefix]).encode()
        signed[_FILE] = _sha256([prefix, *payload]).encode()

        def write(file: BinaryIO) -> None:
            file.write(signed)
            for part in payload:
                file.write(part)

        atomic_write(path, write)
        return _sizes(len(prefix), {name: a.nbytes for name, a in arrays.items()})

    @staticmethod
    def open(path: str | Path) -> Artifact:
        """Open a written file; see :class:`Artifact`."""
        return Artifact(Path(path))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by their file names."""
        table = {f"table.{name}": array for name, array in self.packed.arrays().items()}
        return {**table, **self.vocabulary.arrays(), **self.program.tensors()}

    def _meta(self, chunks: str) -> dict[str, Any]:
        """The metadata, with zeros for the digests of file and header."""
        return {
            "checks": {"file": _ZEROS, "header": _ZEROS},
            "chunks": chunks,
            "format": FORMAT,
            "head": self.program.to_json(),
            "info": dict(self.info),
            "kind": self.kind,
            "schema": self.schema.to_json(),
            "table": self.packed.meta(),
            "vocabulary": self.vocabulary.to_json(),
        }


class Artifact:
    """An opened file: its header is read and checked, its parts are memory-mapped and checked when first asked for.

    Raises:
        ArtifactError: the bytes are not a file of PocketRec, or they are damaged.
        StorageError: the file system refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping = map_file(path)
        self._extents, meta, self._payload = parse_header(self._mapping, path)
        self._meta = self._checked(meta)
        self._good_chunks: set[int] = set()
        self.kind: FileKind = self._meta["kind"]
        self.info: dict[str, Any] = self._meta["info"]
        self.schema = _schema(self._meta["schema"], path)

    @property
    def digest(self) -> str:
        """SHA-256 of the file, its own digits counted as zeros; names the file's contents."""
        return self._meta["checks"]["file"]

    def sizes(self) -> dict[str, int]:
        """Bytes of the file and of its parts ``table``, ``vocabulary``, ``head``, ``header``, which sum to ``file``."""
        return _sizes(self._payload, {name: e.stop - e.start for name, e in self._extents.items()})

    def describe(self) -> dict[str, Any]:
        """A JSON document for people: kind, sizes, digest, fields and info."""
        rows = self._meta["vocabulary"]["keys"]
        return {
            "kind": self.kind,
            "format": self._meta["format"],
            "digest": self.digest,
            "bytes": self.sizes(),
            "fields": [
                {"name": f.name, "cardinality": f.size, "keys": f.keys, "rows": n}
                for f, n in zip(self.schema.fields, rows, strict=True)
            ],
            "info": self.info,
        }

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Raw values -> file rows."""
        return self._read(
            "vocabulary", lambda arrays: Vocabulary.from_json(self.schema, self._meta["vocabulary"], arrays)
        )

    @cached_property
    def packed(self) -> Packed:
        """File rows -> vectors."""
        bare = len("table.")
        return self._read(
            "table", lambda arrays: Packed.from_arrays(self._meta["table"], {n[bare:]: a for n, a in arrays.items()})
        )

    @cached_property
    def program(self) -> Program:
        """Vectors -> logits or scores."""
        return self._read("head", lambda arrays: Program.from_json(self._meta["head"], arrays))

    def verify(self) -> None:
        """Check every byte of the file and build every part.

        Raises:
            ArtifactError: a byte is not what was written.
        """
        zeroed = _unsigned(self._mapping[: self._payload].tobytes())
        if _sha256([zeroed, self._mapping[self._payload :].data]) != self.digest:
            raise ArtifactError(f"{self.path} is damaged: its SHA-256 is not the one in its header; copy it again.")
        _ = self.vocabulary, self.packed, self.program

    def _checked(self, meta: Any) -> dict[str, Any]:
        """The metadata, once its version, digest, keys and types are right."""
        version = meta.get("format") if isinstance(meta, dict) else None
        if type(version) is not int or version < 1:
            raise ArtifactError(
                f"{self.path} is a safetensors file, but not an artifact of PocketRec; export it again."
            )
        if version > FORMAT:
            raise ArtifactError(
                f"{self.path} was written by a newer version: its format is {version}, and this PocketRec reads "
                f"formats up to {FORMAT}; update PocketRec."
            )
        prefix = self._mapping[: self._payload].tobytes()
        lead = prefix[8 : _FILE.start] + prefix[_FILE.stop : _HEADER.start]
        if lead != _LEAD + _BETWEEN or _sha256([_unsigned(prefix)]).encode() != prefix[_HEADER]:
            raise ArtifactError(
                f"{self.path} has a damaged header: its digest does not match; copy or export it again."
            )
        chunks = -(-(len(self._mapping) - self._payload) // CHUNK)
        types = {"chunks": str, "head": list, "info": dict, "schema": dict, "table": dict, "vocabulary": dict}
        sound = (
            set(meta) == _KEYS
            and all(isinstance(meta[key], kind) for key, kind in types.items())
            and meta["kind"] in get_args(FileKind)
            and meta["schema"].get("task") == ("ctr" if meta["kind"] == "ctr" else "cf")
            and len(meta["chunks"]) == 64 * chunks
            and all(name.partition(".")[0] in _PARTS for name in self._extents)
        )
        if not sound:
            raise ArtifactError(f"{self.path} has an unexpected header; export it again with this version.")
        return meta

    def _read(self, part: str, build: Callable[[dict[str, NDArray[Any]]], _T]) -> _T:
        """Check the chunks that a part lies in, then build it on views of the mapped file."""
        extents = {name: e for name, e in self._extents.items() if name.partition(".")[0] == part}
        for extent in extents.values():
            self._check_chunks(extent)
        try:
            return build(view_arrays(self._mapping, extents, self._payload))
        except (*_BROKEN, PocketRecError) as error:
            raise ArtifactError(f"{self.path} has a {part} that cannot be read: {error}") from error

    def _check_chunks(self, extent: Extent) -> None:
        """Compare the chunks under an array with their digests, each once."""
        for chunk in range(extent.start // CHUNK, -(-extent.stop // CHUNK)):
            if chunk in self._good_chunks:
                continue
            start = self._payload + chunk * CHUNK
            if (
                _sha256([self._mapping[start : start + CHUNK].data])
                != self._meta["chunks"][64 * chunk : 64 * (chunk + 1)]
            ):
                raise ArtifactError(f"{self.path} is damaged in the {CHUNK:,} bytes at {start:,}; copy it again.")
            self._good_chunks.add(chunk)


def _sha256(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of parts behind each other, in hexadecimal."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def _chunk_digests(parts: Iterable[memoryview]) -> Iterator[str]:
    """SHA-256 of each ``CHUNK`` bytes of the parts behind each other."""
    hasher, room = hashlib.sha256(), CHUNK
    for part in parts:
        while part:
            hasher.update(part[:room])
            room, part = room - min(room, len(part)), part[room:]
            if not room:
                yield hasher.hexdigest()
                hasher, room = hashlib.sha256(), CHUNK
    if room < CHUNK:
        yield hasher.hexdigest()


def _unsigned(prefix: bytes) -> bytes:
    """The header with zeros for its two digests."""
    copy = bytearray(prefix)
    copy[_FILE] = copy[_HEADER] = _ZEROS.encode()
    return bytes(copy)


def _sizes(prefix: int, arrays: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the file and its parts, from the bytes of the header and of each array."""
    parts = {part: sum(n for name, n in arrays.items() if name.partition(".")[0] == part) for part in _PARTS}
    return {"file": prefix + sum(parts.values()), **parts, "header": prefix}


def _schema(document: Mapping[str, Any], path: Path) -> Schema:
    """The schema of an untrusted header."""
    try:
        fields = [Field(**f) for f in document["fields"]]
        sound = (
            set(document) == {"task", "fields"}
            and all(_sound(f) for f in fields)
            and len({f.name for f in fields}) == len(fields)
            and sum(f.size for f in fields) < 2**48
        )
        if sound:
            return Schema(document["task"], tuple(fields))
    except (*_BROKEN, PocketRecError) as error:
        raise ArtifactError(f"{path} has a damaged schema: {error}") from error
    raise ArtifactError(f"{path} has a schema with impossible values; export it again.")


def _sound(field: Field) -> bool:
    """Whether a field read from a file has the right types and possible values."""
    whole = all(type(n) is int and abs(n) < 2**62 for n in (field.size, field.offset, field.first))
    return whole and isinstance(field.name, str) and field.keys in get_args(Keys) and type(field.oov) is bool
