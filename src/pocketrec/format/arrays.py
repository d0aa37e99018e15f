"""Named arrays in safetensors files, written atomically, checksummed, and read without trust."""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, ConfigError
from pocketrec.files import atomic_write, canonical_json, parse_json, storage_errors

HEADER_LIMIT = 4 << 20
"""Longest accepted header of an array file, in bytes."""

_DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BOOL": np.dtype("?"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
}  # fmt: skip

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_CHECKSUM = "crc32"


@dataclass(frozen=True)
class Extent:
    """Where an array lies: bytes ``[start, stop)`` of the payload, which follows the header."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


def header(arrays: Mapping[str, NDArray[Any]], meta: Any, blank: int = 0) -> tuple[bytes, list[str]]:
    """The safetensors header (length prefix included) of an array file, and the order of its arrays.

    Arrays are ordered by falling item size, then by name, and the header is padded to 8 bytes, after as many spaces as
    shall be ``blank``: all are aligned, and no byte lies between them. Only dtypes and shapes are read.

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
    text = canonical_json(document) + b" " * blank
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
