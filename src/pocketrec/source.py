"""What a raw log format is: the abstract :class:`Source`, the batches it yields, and the reader of delimited text.

A source reads a file once, in order and in bounded memory. It yields every row as strings (or as integers where the
range is known) and sets unreadable rows aside by line and reason; it never drops a row silently.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pocketrec.errors import DataError
from pocketrec.files import storage_errors
from pocketrec.schema import Task

Kind = Literal["category", "integer", "dense", "number"]

BLOCK_BYTES = 1 << 22
LINE_BYTES = 1 << 26
BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class Column:
    """One feature column and how its values become ids.

    ``category``: every distinct string is a value. ``integer``: the same, but kept without a vocabulary when the range
    of the training values is at least half occupied. ``dense``: integers, always without a vocabulary. ``number``: the
    source has already reduced the values to few strings (see the source). ``size``: the values are known to be the
    integers ``0 .. size - 1``.
    """

    name: str
    kind: Kind = "category"
    size: int | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read: its line (1-based; for parquet its row), why, and what exactly came."""

    line: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a raw file.

    ``frame`` holds the feature columns (strings without nulls; integers where ``Column.size`` is given) and the
    label, split and teacher columns that the :class:`Scan` names; ``lines`` ``(n,)`` int64 are their 1-based lines.
    """

    frame: pl.DataFrame
    lines: NDArray[np.int64]
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class Scan:
    """An opened raw file: what its columns are, and its batches, which can be read once."""

    columns: tuple[Column, ...]
    batches: Iterator[Batch]
    label: str | None = None
    split: str | None = None
    teacher: str | None = None


class Source(ABC):
    """A raw log format; subclasses are frozen dataclasses, one per file in ``sources/``."""

    name: ClassVar[str]
    task: ClassVar[Task] = "ctr"
    generates: ClassVar[bool] = False
    """Whether the rows are made rather than read, so that there is no raw file."""

    @abstractmethod
    def scan(self, path: Path, columns: tuple[Column, ...] | None = None) -> Scan:
        """Open ``path`` lazily; ``columns`` are those of the training file when ``path`` is another part of it.

        Raises:
            DataError: the file is missing, empty, a folder, or does not have the promised columns.
        """


def require_file(path: Path) -> Path:
    """``path`` itself, or a :class:`DataError` that says why it cannot be read as a file."""
    if path.is_dir():
        raise DataError(f"{path}: expected a file, but got a folder; name the file inside it.")
    if not path.exists():
        raise DataError(f"{path}: expected a file, but there is none; check the path.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: expected rows, but the file is empty (0 bytes).")
    return path


@dataclass(frozen=True)
class Lines:
    """Consecutive decoded lines without their ends, the 1-based numbers of these lines, and the undecodable ones."""

    texts: list[str]
    numbers: list[int]
    bad: list[BadRow]


def read_lines(path: Path) -> Iterator[Lines]:
    r"""The lines of a UTF-8 text file (``.gz`` is unpacked), block by block.

    A byte-order mark and ``\r`` before ``\n`` are removed; a line that is blank, holds a NUL byte or is not UTF-8 is
    bad.
    """
    first, rest = 1, b""
    with _open(require_file(path)) as stream:
        while block := _read(stream, path):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                lines = _decode(whole, first)
                yield lines
                first += len(lines.texts) + len(lines.bad)
            if len(rest) > LINE_BYTES:
                raise DataError(f"{path}:{first}: expected a text file, but got a line of over {LINE_BYTES:,} bytes.")
    if rest:
        yield _decode(rest, first)


def _open(path: Path) -> BinaryIO:
    with storage_errors(path, "read"):
        return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _read(stream: BinaryIO, path: Path) -> bytes:
    try:
        return stream.read(BLOCK_BYTES)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: expected a whole readable file, but got: {error}; fetch it again.") from error


def _decode(block: bytes, first: int) -> Lines:
    """The lines of a block, the first of which has number ``first``; line by line only where one of them is bad."""
    if first == 1:
        block = block.removeprefix(b"\xef\xbb\xbf")
    block = block.replace(b"\r\n", b"\n").removesuffix(b"\r")
    raw = block.split(b"\n")
    if b"" in raw or b"\0" in block:
        return _decode_each(raw, first)
    try:
        texts = block.decode().split("\n")
    except UnicodeDecodeError:
        return _decode_each(raw, first)
    return Lines(texts, list(range(first, first + len(texts))), [])


def _decode_each(raw: list[bytes], first: int) -> Lines:
    lines = Lines([], [], [])
    for number, line in enumerate(raw, first):
        if not line:
            lines.bad.append(BadRow(number, "blank line"))
        elif b"\0" in line:
            lines.bad.append(BadRow(number, "NUL byte"))
        else:
            try:
                lines.texts.append(line.decode())
            except UnicodeDecodeError:
                lines.bad.append(BadRow(number, "invalid UTF-8"))
            else:
                lines.numbers.append(number)
    return lines


def read_delimited(path: Path, names: Sequence[str], separator: str, *, header: bool, quotes: bool) -> Iterator[Batch]:
    """Batches of string columns ``names``; rows with another number of columns are bad.

    ``header``: the first line is skipped. ``quotes``: a cell may stand in double quotes, on one line (RFC 4180).
    """
    for lines in read_lines(path):
        if header and lines.numbers and lines.numbers[0] == 1:
            lines = Lines(lines.texts[1:], lines.numbers[1:], lines.bad)
        quoted = quotes and any('"' in text for text in lines.texts)
        yield _delimit_quoted(lines, names, separator) if quoted else delimit(lines, names, separator)


def delimit(lines: Lines, names: Sequence[str], separator: str) -> Batch:
    """The string columns ``names`` of lines without quotes; a line with another number of columns is bad."""
    texts, numbers, bad = lines.texts, lines.numbers, lines.bad
    counts = [text.count(separator) + 1 for text in texts]
    if any(count != len(names) for count in counts):
        good = [i for i, count in enumerate(counts) if count == len(names)]
        bad = bad + [_ragged(n, c, len(names)) for n, c in zip(numbers, counts, strict=True) if c != len(names)]
        texts, numbers = [texts[i] for i in good], [numbers[i] for i in good]
    return Batch(_frame(texts, names, separator), np.array(numbers, np.int64), bad)


def _frame(texts: list[str], names: Sequence[str], separator: str) -> pl.DataFrame:
    if not texts:
        return pl.DataFrame(schema=dict.fromkeys(names, pl.String))
    return pl.read_csv(
        io.BytesIO("\n".join(texts).encode()),
        has_header=False,
        new_columns=list(names),
        separator=separator,
        quote_char=None,
        infer_schema=False,
    ).fill_null("")


def _delimit_quoted(lines: Lines, names: Sequence[str], separator: str) -> Batch:
    rows, numbers, bad = [], [], list(lines.bad)
    for text, number in zip(lines.texts, lines.numbers, strict=True):
        try:
            cells = split_quoted(text, separator)
        except csv.Error:
            bad.append(BadRow(number, "quote not closed on its line"))
            continue
        if len(cells) == len(names):
            rows.append(cells)
            numbers.append(number)
        else:
            bad.append(_ragged(number, len(cells), len(names)))
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")
    return Batch(frame, np.array(numbers, np.int64), bad)


def split_quoted(text: str, separator: str) -> list[str]:
    """The cells of one line whose cells may stand in double quotes; ``csv.Error`` if a quote is not closed."""
    return next(csv.reader([text], delimiter=separator, strict=True))


def _ragged(number: int, got: int, expected: int) -> BadRow:
    return BadRow(number, "wrong number of columns", f"expected {expected}, but got {got}")


def whole_numbers(batch: Batch, names: Sequence[str]) -> Batch:
    """The columns ``names`` as int64; rows in which one of them is not a whole number of at least 0 are bad."""
    frame = batch.frame.select(pl.col(n).cast(pl.Int64, strict=False).alias(n) for n in names)
    valid = frame.select(pl.all_horizontal(pl.all() >= 0).fill_null(False)).to_series()
    return reject(batch, frame, valid, "not a whole number of at least 0", names)


def reject(batch: Batch, frame: pl.DataFrame, valid: pl.Series, reason: str, names: Sequence[str]) -> Batch:
    """``batch`` with the columns of ``frame``, its rows where ``valid`` is false set aside with their raw ``names``."""
    if valid.all():
        return Batch(frame, batch.lines, batch.bad)
    refused = batch.frame.filter(~valid).select(names).rows()
    mask = valid.to_numpy()
    bad = [BadRow(int(n), reason, f"got {raw!r}") for n, raw in zip(batch.lines[~mask], refused, strict=True)]
    return Batch(frame.filter(valid), batch.lines[mask], batch.bad + bad)
