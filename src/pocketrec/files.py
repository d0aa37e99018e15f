"""Everything that touches the disk: atomic writes, locks, journals, array files, digests. Torch-free.

Nothing else in the package opens a file for writing. A file is old or new, never torn; a journal heals a torn tail; a
lock dies with its process. Array files are safetensors with **one** metadata key, ``pocketrec``, holding canonical
JSON, so that the same contents are the same bytes; the array ``crc32`` in them is their checksum.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import mmap
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, ConfigError, RunLocked, StorageError

HEADER_LIMIT = 4 << 20
"""Longest accepted header of an array file, in bytes."""

_DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BOOL": np.dtype("?"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHECKSUM = "crc32"
_passed = itertools.count(1)


def boundary(name: str) -> None:
    """A point at which a crash must cost nothing but time: each write, rename and training step passes one.

    With ``POCKETREC_CRASH_AT=N`` the ``N``-th boundary of the process kills it with SIGKILL. With
    ``POCKETREC_CRASH_COUNT=FILE`` every boundary appends its name as a line to ``FILE``, so that tests can count them.
    """
    crash_at, count_file = os.environ.get("POCKETREC_CRASH_AT"), os.environ.get("POCKETREC_CRASH_COUNT")
    if crash_at is None and count_file is None:
        return
    number = next(_passed)
    if count_file is not None:
        with Path(count_file).open("a", encoding="utf-8") as lines:
            lines.write(f"{name}\n")
    if crash_at is not None and number == int(crash_at):
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def storage_errors(path: Path, action: str) -> Iterator[None]:
    """Turn an :class:`OSError` inside the block into a :class:`StorageError` that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"Cannot {action} {path}: {reason}; check the folder, its permissions and its space."
        ) from error


def canonical_json(document: Any) -> bytes:
    """The one spelling of a JSON document: sorted keys, no spaces, UTF-8, finite numbers only.

    Raises:
        ConfigError: the document holds something that JSON cannot express.

    Example:
        >>> canonical_json({"b": (1, 2.5), "a": None})
        b'{"a":null,"b":[1,2.5]}'
    """
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Expected a JSON document with finite numbers, but got one with: {error}.") from error


def digest(content: Any) -> str:
    """SHA-256 in hexadecimal, of bytes as they are and of anything else as canonical JSON.

    Example:
        >>> digest({"a": 1}) == digest(b'{"a":1}')
        True
    """
    data = content if isinstance(content, bytes | bytearray | memoryview) else canonical_json(content)
    return hashlib.sha256(data).hexdigest()


def _claim(path: Path, operation: int) -> int:
    """Open ``path`` and hold its lock; :class:`BlockingIOError` if ``LOCK_NB`` is asked for and another holds it.

    The kernel drops the lock when its holder dies. A file that was renamed or removed before its lock came is let go,
    and the one that now has its name is tried.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, operation)
            if _still_named(path, fd):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        os.close(fd)


def _still_named(path: Path, fd: int) -> bool:
    """Whether ``path`` is still the name of the file behind the descriptor."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power loss."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _temporary(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(f".{path.name}.tmp")


def remove(path: Path) -> None:
    """Remove a file, and what a killed write of it left; neither has to exist.

    Raises:
        StorageError: the file system refused.
    """
    with storage_errors(path, "remove"):
        path.unlink(missing_ok=True)
        _temporary(path).unlink(missing_ok=True)


def atomic_write(path: str | Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file so that every reader, at every instant and after every crash, sees the old file or the new one.

    The bytes go to ``.NAME.tmp`` in the same folder, are synced, and take the name by a rename, which is synced too.
    After an error no temporary file is left; one left by a killed process is reused by the next write. Two writers of
    one path take turns.

    Args:
        path: the file; its folder must exist.
        content: the bytes, or a function that writes them to an open binary file.

    Raises:
        StorageError: the file system refused; the old file is intact.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> atomic_write(target, b"hello")
        >>> target.read_bytes()
        b'hello'
    """
    path = Path(path)
    temporary = _temporary(path)
    with storage_errors(path, "write"):
        fd = _claim(temporary, fcntl.LOCK_EX)
        try:
            with os.fdopen(fd, "wb") as file:
                file.truncate(0)
                boundary("write")
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
                boundary("rename")
                temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        boundary("renamed")
        _sync_folder(path.parent)


class Lock:
    """Exclusive use of a folder by one process, as a context manager around a lock file.

    A second living process gets :class:`RunLocked` at once; the lock of a dead process is free.

    Example:
        >>> import tempfile
        >>> with Lock(Path(tempfile.mkdtemp()) / "lock"):
        ...     pass
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd: int | None = None

    def __enter__(self) -> Self:
        with storage_errors(self.path, "lock"):
            try:
                fd = _claim(self.path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunLocked(
                    f"{self.path.parent} is in use by another process{self._holder()}; "
                    "wait for it, stop it, or choose another folder."
                ) from None
            os.ftruncate(fd, 0)
            os.write(fd, f"pid {os.getpid()}\n".encode())
        self._fd = fd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._fd)
            self._fd = None

    def _holder(self) -> str:
        """Who holds the lock, as far as its file tells."""
        try:
            return f" ({self.path.read_text(encoding='utf-8').strip()})"
        except OSError:
            return ""


class Journal:
    """An append-only list of JSON records, one a line: ``crc32 json``; safe against crashes and concurrent writers.

    Args:
        path: the file.
        synced: whether a record is on the disk when ``append`` returns; else a power failure may take the last ones.

    Opening verifies every line and cuts a torn last record off. Damage before the last record is not a torn write and
    raises :class:`ArtifactError`.

    Example:
        >>> import tempfile
        >>> journal = Journal(Path(tempfile.mkdtemp()) / "results.journal")
        >>> journal.append({"auc": 0.75})
        >>> journal.read()
        [{'auc': 0.75}]
    """

    def __init__(self, path: str | Path, *, synced: bool = True) -> None:
        self.path = Path(path)
        self._synced = synced
        with storage_errors(self.path, "open"), self._locked() as fd:
            self._heal(fd)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record."""
        body = canonical_json(dict(record))
        with storage_errors(self.path, "append to"), self._locked() as fd:
            end = os.lseek(fd, 0, os.SEEK_END)
            if end and os.pread(fd, 1, end - 1) != b"\n":
                end = self._heal(fd)
            boundary("append")
            try:
                _write_at(fd, b"%08x %s\n" % (zlib.crc32(body), body), end)
                if self._synced:
                    os.fsync(fd)
            except BaseException:
                os.ftruncate(fd, end)
                raise
            boundary("appended")

    def read(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        with storage_errors(self.path, "read"), self._locked() as fd:
            return self._parse(_read_all(fd))[0]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """A descriptor of the journal, locked against other writers."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            os.close(fd)

    def _heal(self, fd: int) -> int:
        """Truncate to the last good record; the new length."""
        content = _read_all(fd)
        _, good = self._parse(content)
        if good < len(content):
            os.ftruncate(fd, good)
            os.fsync(fd)
        return good

    def _parse(self, content: bytes) -> tuple[list[dict[str, Any]], int]:
        """Records of the good prefix, and its length in bytes."""
        records: list[dict[str, Any]] = []
        good = 0
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            record = _record(line)
            if record is None:
                if good + len(line) < len(content):
                    raise ArtifactError(f"{self.path}: record {number} is damaged; restore the file or move it away.")
                break
            records.append(record)
            good += len(line)
        return records, good


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a journal line, or ``None`` if the line is torn or damaged."""
    checksum, separator, body = line.removesuffix(b"\n").partition(b" ")
    if not separator or not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(body):
        return None
    return json.loads(body)


def _read_all(fd: int) -> bytes:
    """The whole file behind a descriptor."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    """Write all of ``data``, however short the single writes are."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


@dataclass(frozen=True)
class Extent:
    """Where an array lies: bytes ``[start, stop)`` of the payload, which follows the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


def header(arrays: Mapping[str, NDArray[Any]], meta: Any) -> tuple[bytes, list[str]]:
    """The safetensors header (length prefix included) of an array file, and the order of its arrays.

    Arrays are ordered by falling item size, then by name, and the header is padded to 8 bytes: all are aligned, and no
    byte lies between them. Only dtypes and shapes are read.

    Raises:
        ConfigError: a dtype is not supported, or the header is longer than ``HEADER_LIMIT``.
    """
    order = _order(arrays)
    document: dict[str, Any] = {"__metadata__": {"pocketrec": canonical_json(meta).decode()}}
    start = 0
    for name in order:
        array = arrays[name]
        stop = start + array.nbytes
        document[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [start, stop]}
        start = stop
    text = canonical_json(document)
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT:
        raise ConfigError(
            f"A header may take {HEADER_LIMIT:,} bytes, but this one takes {len(text):,}; store less in it."
        )
    return len(text).to_bytes(8, "little") + text, order


def _order(arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """Names of arrays in the order of their bytes; one that cannot be stored is a :class:`ConfigError`."""
    for name, array in arrays.items():
        if array.dtype not in _NAMES or name == "__metadata__":
            raise ConfigError(f"Array {name!r} must have a dtype of {', '.join(_DTYPES)}, but has {array.dtype}.")
    return sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))


def _checksum(arrays: Mapping[str, NDArray[Any]], meta: Any) -> NDArray[np.uint32]:
    """CRC-32 over document, names, dtypes, shapes and bytes."""
    order = _order(arrays)
    checksum = zlib.crc32(canonical_json([meta, [(n, arrays[n].dtype.str, arrays[n].shape) for n in order]]))
    for name in order:
        checksum = zlib.crc32(buffer(arrays[name]), checksum)
    return np.array([checksum], np.uint32)


def buffer(array: NDArray[Any]) -> memoryview:
    """The bytes of an array in C order; no copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def save_arrays(path: str | Path, arrays: Mapping[str, NDArray[Any]], meta: Any = None) -> None:
    """Write arrays and a JSON document to one safetensors file: atomic, streaming, the same contents the same bytes.

    Args:
        path: the file; its folder must exist.
        arrays: bool, integer (8-64 bits) and float (16-64 bits) arrays by name.
        meta: any JSON document.

    Raises:
        ConfigError: an array or the document cannot be stored.
        StorageError: the file system refused.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> save_arrays(target, {"x": np.arange(3)}, {"step": 7})
        >>> arrays, meta = open_arrays(target)
        >>> arrays["x"].tolist(), meta
        ([0, 1, 2], {'step': 7})
    """
    signed = {**arrays, _CHECKSUM: _checksum(arrays, meta)}
    prefix, order = header(signed, meta)

    def write(file: BinaryIO) -> None:
        file.write(prefix)
        for name in order:
            file.write(buffer(signed[name]))

    atomic_write(path, write)


def open_arrays(path: str | Path) -> tuple[dict[str, NDArray[Any]], Any]:
    """Read-only, memory-mapped arrays of a file written by :func:`save_arrays`, and its JSON document.

    Every byte is read once, for the checksum, where the file has one.

    Raises:
        ArtifactError: the bytes are not an array file, or it is damaged or cut short.
        StorageError: the file system refused.
    """
    path = Path(path)
    mapping = map_file(path)
    extents, meta, payload = parse_header(mapping, path)
    arrays = view_arrays(mapping, extents, payload)
    checksum = arrays.pop(_CHECKSUM, None)
    if checksum is not None and not np.array_equal(checksum, _checksum(arrays, meta)):
        raise ArtifactError(
            f"{path} is damaged: its checksum does not match; remove it, and the same command makes it again."
        )
    return arrays, meta


def map_file(path: Path) -> NDArray[np.uint8]:
    """The bytes of a file as a read-only, memory-mapped array."""
    with storage_errors(path, "read"), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ArtifactError(f"{path} is empty; expected a safetensors file of PocketRec.")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(memoryview(mapped), dtype=np.uint8)


def view_arrays(mapping: NDArray[np.uint8], extents: Mapping[str, Extent], payload: int) -> dict[str, NDArray[Any]]:
    """The arrays at their extents, as views of the mapped file."""
    return {
        name: mapping[payload + e.start : payload + e.stop].view(e.dtype).reshape(e.shape)
        for name, e in extents.items()
    }


def parse_header(mapping: NDArray[np.uint8], path: Path) -> tuple[dict[str, Extent], Any, int]:
    """Extents, JSON document and payload offset of a mapped array file; everything is checked before it is believed.

    The checks, in order: the length, the JSON (no repeated key, no number that is not finite), exact keys and types,
    and extents that follow each other without gap or overlap and end where the file ends.

    Raises:
        ArtifactError: any check fails.
    """
    size = len(mapping)
    length = int.from_bytes(mapping[:8].tobytes(), "little")
    if size < 8 or length > min(size - 8, HEADER_LIMIT):
        raise ArtifactError(
            f"{path} is not a PocketRec file, or it is cut short{_looks_like(mapping)}: expected a header of at most "
            f"{HEADER_LIMIT:,} bytes inside a file of {size:,}, but its length reads {length:,}."
        )
    payload = 8 + length
    try:
        document = parse_json(mapping[8:payload].tobytes())
        meta = parse_json(_exact(document.pop("__metadata__"), {"pocketrec"})["pocketrec"])
        extents = {name: _extent(entry) for name, entry in document.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} has a damaged header ({error}); copy or export it again.") from error
    stop = 0
    for extent in sorted(extents.values(), key=lambda e: (e.start, e.stop)):
        if extent.start != stop:
            raise ArtifactError(
                f"{path}: expected an array at byte {stop} of the payload, but the next is at {extent.start}."
            )
        stop = extent.stop
    if payload + stop != size:
        raise ArtifactError(
            f"{path} must have {payload + stop:,} bytes by its header, but has {size:,}; copy it again."
        )
    return extents, meta, payload


def parse_json(data: bytes | str) -> Any:
    """Parse JSON from an untrusted file: a repeated key or a number that is not finite is a :class:`ValueError`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(items)
        if len(document) != len(items):
            raise ValueError("a key is repeated")
        return document

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is not a finite number")
        return value

    text = data if isinstance(data, str) else data.decode()
    return json.loads(text, object_pairs_hook=pairs, parse_float=number, parse_constant=number)


def _exact(entry: Any, keys: set[str]) -> dict[str, Any]:
    """``entry``, if it is an object with exactly these keys."""
    if not isinstance(entry, dict) or set(entry) != keys:
        raise ValueError(f"expected an object with the keys {sorted(keys)}")
    return entry


def _extent(entry: Any) -> Extent:
    """Read one array's header entry; sizes are Python integers, so nothing overflows and nothing is allocated."""
    entry = _exact(entry, {"dtype", "shape", "data_offsets"})
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or len(shape) > 8:
        raise ValueError("a shape must be a list of at most 8 sizes, and offsets a pair")
    if any(type(n) is not int or n < 0 for n in shape + offsets) or math.prod(max(n, 1) for n in shape) >= 2**60:
        raise ValueError("sizes must be integers, at least 0 and below 2^60 together")
    dtype = _DTYPES[entry["dtype"]]
    if offsets[1] - offsets[0] != dtype.itemsize * math.prod(shape):
        raise ValueError(f"an array of shape {shape} cannot fill bytes {offsets}")
    return Extent(dtype, tuple(shape), offsets[0], offsets[1])


def _looks_like(mapping: NDArray[np.uint8]) -> str:
    """What a foreign file probably is."""
    start = mapping[:2].tobytes()
    if start == b"PK":
        return " (it looks like a zip archive, as torch.save writes)"
    if start[:1] == b"\x80":
        return " (it looks like a pickle, which PocketRec never loads)"
    return ""
