"""The numbers that all files share, in ``constants.bin``: levels of the quantiser, tables of the trellis codes.

They are data, not arithmetic: a file means the same on every processor, and opening one computes none of them.
``docs/format.md`` describes the file, ``bench/constants_definition.py`` where its numbers come from.
Torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError
from pocketrec.format.arrays import map_file, parse_header, view_arrays

PATH = Path(__file__).with_name("constants.bin")
DIGEST = "90c7767aecbb12fc60df50066a13c695cf26ce6ee83045a10b32041318f892e5"
"""SHA-256 of the file; a change of it is a change of the format."""


def levels(bits: int) -> NDArray[np.float32]:
    """The ``2^bits`` levels of the scalar quantiser, rising; ``bits`` of 0 to 8.

    Example:
        >>> levels(1).tolist()
        [-0.79791259765625, 0.79791259765625]
    """
    return constants()["levels"][(1 << bits) - 1 : (2 << bits) - 1]


def trellis(number: int) -> NDArray[np.float32]:
    """The table of trellis code ``number``, 1 to 10: ``(2^memory, span)``.

    Example:
        >>> trellis(1).shape
        (1024, 4)
    """
    return constants()[f"trellis.{number}"]


@cache
def constants() -> Mapping[str, NDArray[np.float32]]:
    """All arrays of the file, read-only and memory-mapped, once its digest is right.

    Raises:
        ArtifactError: the file is not the one of this package.
        StorageError: the file system refused.
    """
    return read(PATH)


def read(path: Path) -> Mapping[str, NDArray[np.float32]]:
    """The arrays of a copy of the file; see :func:`constants`."""
    mapping = map_file(path)
    found = hashlib.sha256(mapping.data).hexdigest()
    if found != DIGEST:
        raise ArtifactError(
            f"{path} must have the SHA-256 {DIGEST[:16]}..., but has {found[:16]}...; install PocketRec again."
        )
    extents, _, payload = parse_header(mapping, path)
    return view_arrays(mapping, extents, payload)
