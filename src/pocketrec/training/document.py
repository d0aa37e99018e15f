"""The small document in the folder of a trained model: what it is and how it came to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketrec.errors import ArtifactError
from pocketrec.files import atomic_write, canonical_json, digest, parse_json

if TYPE_CHECKING:
    pass


DOCUMENT = "run.json"


def write_document(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``run.json``: what was trained here, signed with the digest of its own content."""
    atomic_write(folder / DOCUMENT, canonical_json({**content, "digest": digest(dict(content))}) + b"\n")


def read_document(folder: Path) -> dict[str, Any]:
    """The content of ``run.json``.

    Raises:
        ArtifactError: there is none, or a byte of it changed.
    """
    file = folder / DOCUMENT
    if not file.is_file():
        raise ArtifactError(f"{folder} holds no trained model; expected {DOCUMENT}. Train one with this folder as run.")
    content: dict[str, Any] = {}
    try:
        content = dict(parse_json(file.read_bytes()))
        intact = content.pop("digest") == digest(content)
    except (KeyError, RecursionError, TypeError, ValueError):
        intact = False
    if not intact:
        raise ArtifactError(f"{file} is damaged; train again with this folder as run.")
    return content
