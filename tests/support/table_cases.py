"""A small click table with a linear part, and pairs whose fields have two blocks each."""

from __future__ import annotations

from pocketrec.models.table import Block
from pocketrec.schema import Field, Schema

SCHEMA = Schema("ctr", (Field("a", 12, 0), Field("b", 5, 12), Field("c", 3, 17, oov=False)))
CLICK_BLOCKS = (Block("embedding", 0, 20, 0, 4), Block("linear", 0, 20, 4, 5, counted=False))
PAIRS = Schema("cf", (Field("user", 6, 0, "dense", oov=False), Field("item", 9, 6, "dense", oov=False)))
FOUR = tuple(
    Block(f"{name}_{side}", f.offset, f.stop, left, left + 3)
    for f, name in zip(PAIRS.fields, ("user", "item"), strict=True)
    for side, left in (("product", 0), ("perceptron", 3))
)
