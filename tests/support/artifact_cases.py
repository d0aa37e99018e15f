"""Small artifacts with known contents, and the tools to tamper with a file and sign it again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketrec.format.artifact import CHUNK, Contents
from pocketrec.format.block import PackedRange, Storage
from pocketrec.format.packed import Packed
from pocketrec.format.program import Op, Program
from pocketrec.format.vocabulary import Vocabulary, hash64
from pocketrec.schema import Field, Schema

ZEROS = "0" * 64


@dataclass(frozen=True)
class Case:
    """Contents of a file, and the whole table ``(n, D)`` that it must be read as."""

    contents: Contents
    table: NDArray[np.float32]
    texts: dict[int, list[str]]


def click(users: int = 5, items: int = 3, width: int = 2, storage: Storage = "int8", seed: int = 0) -> Case:
    """A click model: hashed users ``u0, u1, ...``, dense items from 10 on, a linear part and pairs."""
    schema = Schema("ctr", (Field("user", users + 1, 0), Field("item", items + 1, users + 1, "dense", 10)))
    generator = np.random.default_rng(seed)
    shape = (schema.rows, width + 1)
    weight = generator.normal(size=shape).astype(np.float32)
    keep = generator.random(shape) < 0.4
    keep[[schema.fields[0].stop - 1, schema.fields[1].stop - 1]] = False
    fill, absent = generator.normal(size=(2, 2, width + 1)).astype(np.float32)
    fields = schema.field_of_row
    table = np.where(keep.any(axis=1, keepdims=True), np.where(keep, weight, fill[fields]), absent[fields])
    texts = {0: [f"u{i}" for i in range(users)]}
    vocabulary, rows = Vocabulary.build(schema, keep.any(axis=1), lambda i: hash64(texts[i]))
    blocks = (
        PackedRange("embedding", 0, schema.rows, 0, width),
        PackedRange("linear", 0, schema.rows, width, width + 1),
    )
    packed = Packed.encode(weight, keep, fill, absent, blocks, fields, rows, storage)
    program = Program((
        Op("columns", ("vectors",), "e", {"start": 0, "stop": width}),
        Op("columns", ("vectors",), "w", {"start": width, "stop": width + 1}),
        Op("flatten", ("e",), "x"),
        Op("linear", ("x",), "y", {}, {"weight": np.ones((1, 2 * width), np.float32), "bias": np.zeros(1, np.float32)}),
        Op("sum", ("y",), "deep"),
        Op("fm", ("e",), "pairs"),
        Op("sum", ("w",), "wide", tensors={"bias": np.array(0.25, np.float32)}),
        Op("add", ("deep", "pairs", "wide"), "logit"),
    ))  # fmt: skip
    return Case(Contents("ctr", schema, vocabulary, packed, program, {"method": "test"}), table, texts)


def ranking(users: int = 4, items: int = 30, width: int = 3, kind: Any = "baked", seed: int = 0) -> Case:
    """Final vectors of users from 0 on and items from 100 on; small integers, so that many scores are equal."""
    schema = Schema(
        "cf",
        (Field("user", users, 0, "dense", oov=False), Field("item", items, users, "dense", 100, oov=False)),
    )
    generator = np.random.default_rng(seed)
    weight = generator.integers(-1, 2, (schema.rows, width)).astype(np.float32)
    keep = weight != 0
    absent = np.array([[1] * width, [0] * width], np.float32)
    zeros = np.zeros_like(absent)
    fields = schema.field_of_row
    table = np.where(keep.any(axis=1, keepdims=True), weight, absent[fields])
    vocabulary, rows = Vocabulary.build(schema, keep.any(axis=1), lambda i: hash64([]))
    blocks = (PackedRange("user", 0, users, 0, width), PackedRange("item", users, schema.rows, 0, width))
    packed = Packed.encode(weight, keep, zeros, absent, blocks, fields, rows)
    program = Program((Op("dot", ("vectors",), "score"),))
    return Case(Contents(kind, schema, vocabulary, packed, program, {}), table, {})


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The metadata, the array entries and the payload of a file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    document = json.loads(content[8 : 8 + length])
    return json.loads(document.pop("__metadata__")["pocketrec"]), document, content[8 + length :]


def put(path: Path, content: bytes | bytearray) -> None:
    """Overwrite a file in place, which is much faster than to empty it first."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate(len(content))


def spell(document: Any) -> str:
    """Compact JSON with sorted keys; NaN and infinity pass."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def signed(meta: dict[str, Any], entries: dict[str, Any], payload: bytes) -> bytes:
    """A file of these parts with every digest right, whatever the parts say."""
    chunks = [hashlib.sha256(payload[i : i + CHUNK]).hexdigest() for i in range(0, len(payload), CHUNK)]
    meta = meta | {"checks": {"file": ZEROS, "header": ZEROS}, "chunks": "".join(chunks)}
    text = spell({"__metadata__": {"pocketrec": spell(meta)}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    digests = [hashlib.sha256(header + payload).hexdigest(), hashlib.sha256(header).hexdigest()]
    for value in digests:
        header = header.replace(ZEROS.encode(), value.encode(), 1)
    return header + payload
