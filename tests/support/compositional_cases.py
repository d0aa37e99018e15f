"""Compositional methods at a size for tests, published tables, and vectors as a file gives them."""

from __future__ import annotations

import numpy as np

import pocketrec as pr
from pocketrec.format.block import PackedRange
from pocketrec.format.packed import Packed
from pocketrec.methods.dhe import DHE
from pocketrec.methods.qr import QR
from pocketrec.methods.tt_rec import TTRec

TRAINING = (pr.Training(epochs=2, batch_size=256),)
METHODS = [
    QR(),
    QR(operation="concat", large="quotient", order="id"),
    DHE(depth=2, functions=16),
    DHE(depth=1, functions=8, norm="after", last_layer="bn_mish", code="gaussian", order="id"),
    TTRec(),
    TTRec(cores=2, cache_share=0, order="id"),
]
NAMES = [f"{m.name}-{i}" for i, m in enumerate(METHODS)]


def place(rows: int, width: int) -> PackedRange:
    return PackedRange("table", 0, rows, 0, width)


def in_file(part, rows: int, width: int, storage="fp32") -> np.ndarray:
    """All vectors of a composition, through the arrays of a file."""
    block = part.pack(place(rows, width), storage, None)
    zeros = np.zeros((1, width), np.float32)
    packed = Packed(rows, (block,), zeros, zeros)
    again = Packed.from_arrays(packed.meta(), packed.arrays())
    return again.lookup(np.arange(rows)[:, None], np.zeros(1, np.int32))[:, 0]


CRITEO, AVAZU, GOWALLA, YELP = (1_086_810,), (4_428_511,), (29_858, 40_981), (31_668, 38_048)
