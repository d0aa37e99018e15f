"""Folders and arrays that are written piece by piece and appear whole. Torch-free."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pocketrec.files import Lock, boundary, storage_errors


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A fresh folder to fill, which takes the name ``path`` when the block ends without an error.

    It is a hidden sibling until then. After an error it is removed; one that a killed process left is removed by the
    next attempt. A second process that works on the same ``path`` gets :class:`~pocketrec.errors.RunLocked`.

    Raises:
        StorageError: the file system refused.
    """
    stage = path.with_name(f".{path.name}.partial")
    with storage_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with Lock(path.with_name(f".{path.name}.lock")):
        with storage_errors(stage, "write"):
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir()
        try:
            yield stage
            with storage_errors(path, "write"):
                boundary("rename folder")
                stage.replace(path)
                _sync(path.parent)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        boundary("renamed folder")


@contextlib.contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """A new file to append to, synced at the end; meant for files inside a staged folder."""
    with storage_errors(path, "write"), path.open("xb") as file:
        boundary(f"open {path.name}")
        yield file
        file.flush()
        boundary(f"sync {path.name}")
        os.fsync(file.fileno())


@contextlib.contextmanager
def array_file(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Iterator[BinaryIO]:
    """A new ``.npy`` file of known shape, whose data is appended in C order."""
    with appending(path) as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        )
        yield file


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write a whole array as a ``.npy`` file."""
    with array_file(path, array.dtype, array.shape) as file:
        file.write(np.ascontiguousarray(array).data)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
