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
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from pocketrec.errors import ArtifactError, ConfigError, RunLocked, StorageError

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
