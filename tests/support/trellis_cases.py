"""Coded rankings that tests draw."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from pocketrec.format.layouts.trellis import Records, Shape
from pocketrec.format.trellis_codes import CODES


@st.composite
def coded(draw):
    """A shape and records that fit it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width = draw(st.sampled_from([1, 5, 16, 33, 64]))
    planes = draw(st.integers(0, 3))
    rates = tuple(int(r) for r in rng.integers(0, len(CODES) + 1, 1 << planes))
    users, items = draw(st.sampled_from([0, 3, 40])), draw(st.sampled_from([1, 7, 255, 256, 257, 600]))
    classes = rng.integers(0, 1 << planes, items).astype(np.uint8)
    first = int(rng.integers(0, classes.max() + 1))
    candidates = np.flatnonzero(classes >= first)
    places = max(len(candidates) - 1, 0).bit_length() + int(rng.integers(0, 2))
    shape = Shape(
        users, items, draw(st.integers(0, 5)), rates, first, places, draw(st.integers(0, 3)), int(rng.integers(0, 11))
    )
    return shape, records(shape, classes, candidates, width, rng), width


def codes_of(rates, count, width, rng):
    bits = np.array([0, *(c.bits for c in CODES)])[rates]
    return (rng.integers(0, 256, (count, width)) % (1 << bits)[:, None]).astype(np.uint8)


def records(shape, classes, candidates, width, rng) -> Records:
    return Records(
        classes=classes,
        gains=rng.integers(0, 16, shape.items).astype(np.uint8),
        shapes=rng.integers(0, 1 << shape.shapes, shape.items).astype(np.uint16),
        item_scales=rng.integers(0, 4, shape.items).astype(np.uint8),
        item_codes=codes_of(np.array(shape.rates)[classes], shape.items, width, rng),
        atoms=rng.choice(candidates, (shape.users, shape.atoms)),
        user_scales=rng.integers(0, 4, shape.users).astype(np.uint8),
        user_codes=codes_of(np.full(shape.users, shape.rest), shape.users, width, rng),
        centroids=rng.integers(0, 16, (1 << shape.shapes, width)).astype(np.uint8),
        scales=np.concatenate([[0.5, 1.1, 0.2, 1.5, 0.1, 1.7, 0.13], rng.normal(size=shape.atoms)]).astype(np.float32),
    )
