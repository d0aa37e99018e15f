"""Text files, read block by block: lines, and delimited lines as batches of string columns."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import polars as pl

from pocketrec.data.source import BadRow, Batch, require_file
from pocketrec.errors import DataError
from pocketrec.files import storage_errors

BLOCK_BYTES = 1 << 22
LINE_BYTES = 1 << 26


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
