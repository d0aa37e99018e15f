"""Look-ups of coded tables in the compiled kernel against numpy: widths, numbers of bits, tails, repeated rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pocketrec.errors import ConfigError
from pocketrec.format.layouts import trellis
from pocketrec.format.layouts.transform import TransformBlock
from pocketrec.format.layouts.trellis import Records, Shape, TrellisBlock
from pocketrec.format.packed import Packed
from pocketrec.format.sections import Section, coder
from pocketrec.format.sections import encode as encode_transform
from pocketrec.format.trellis_codes import CODES
from pocketrec.native import library

WIDTHS = (1, 2, 5, 8, 9, 15, 16, 17, 18, 31, 33, 49)


def transformed(rng: np.random.Generator, width: int, rows: int, most_bits: int, directions: int) -> TransformBlock:
    """A field without planes, one of few classes and one of many, of which some store nothing."""
    sections, classes, codes = [], [], []
    for planes, count in ((0, 1), (1, 2), (3, int(rng.integers(1, 9)))):
        bits = rng.integers(0, most_bits + 1, (count, directions))
        basis = rng.integers(-127, 128, (directions, width)).astype(np.int8)
        sections.append(Section(planes, coder(bits, rng.uniform(0.01, 1, bits.shape)), basis))
        kinds = rng.integers(0, 1 << planes, rows)
        widths = np.vstack([bits, np.zeros((8, directions), int)])[kinds]
        classes.append(kinds)
        codes.append((rng.integers(0, 256, widths.shape) % (1 << widths)).astype(np.uint8))
    return TransformBlock("all", 0, 3 * rows, 0, width, "transform", arrays=encode_transform(sections, classes, codes))


def drawn(rng: np.random.Generator, bits: np.ndarray, width: int) -> np.ndarray:
    """Codes of so many bits in each row."""
    return (rng.integers(0, 256, (len(bits), width)) % (1 << bits)[:, None]).astype(np.uint8)


def trellised(rng: np.random.Generator, width: int, planes: int, rest: int) -> TrellisBlock:
    """Users and items whose codes are drawn."""
    users, items, shapes = 37, 300, int(rng.integers(0, 6))
    rates = tuple(int(r) for r in rng.integers(0, len(CODES) + 1, 1 << planes))
    classes = rng.integers(0, 1 << planes, items).astype(np.uint8)
    first = int(classes.max())
    candidates = np.flatnonzero(classes >= first)
    atoms = int(rng.integers(0, 4))
    shape = Shape(users, items, shapes, rates, first, (len(candidates) - 1).bit_length(), atoms, rest)
    bits = np.array([0, *(c.bits for c in CODES)])
    records = Records(
        classes=classes,
        gains=rng.integers(0, 16, items).astype(np.uint8),
        shapes=rng.integers(0, 1 << shapes, items).astype(np.uint16),
        item_scales=rng.integers(0, 4, items).astype(np.uint8),
        item_codes=drawn(rng, bits[np.array(rates)[classes]], width),
        atoms=rng.choice(candidates, (users, atoms)),
        user_scales=rng.integers(0, 4, users).astype(np.uint8),
        user_codes=drawn(rng, np.full(users, bits[rest]), width),
        centroids=rng.integers(0, 16, (1 << shapes, width)).astype(np.uint8),
        scales=np.concatenate([[0.5, 1.1, 0.2, 1.5, 0.1, 1.7, 0.13], rng.normal(size=atoms)]).astype(np.float32),
    )
    return TrellisBlock("all", 0, users + items, 0, width, "trellis", shape, arrays=trellis.encode(shape, records))


def whole(block: TransformBlock | TrellisBlock, rng: np.random.Generator) -> Packed:
    """A table of one block, with a fill and an absent row for each of three fields."""
    fill, absent = rng.normal(size=(2, 3, block.width)).astype(np.float32)
    return Packed(block.rows, (block,), fill if block.layout == "transform" else absent, absent)


def agree(packed: Packed, rows: np.ndarray, tolerance: float) -> None:
    """Every instruction set, with any number of threads, reads what numpy reads, up to the order of sums."""
    fields = np.arange(rows.shape[1], dtype=np.int32) % 3
    expected = packed.lookup_numpy(rows, fields)
    try:
        for most in library.LEVELS:
            library.limit(most)
            found = packed.lookup(rows, fields)
            assert_allclose(found, expected, rtol=1e-5, atol=tolerance)
            assert_array_equal(packed.lookup(rows, fields, threads=3), found)
    finally:
        library.limit(library.LEVELS[-1])


@given(st.integers(0, 2**32 - 1), st.sampled_from(WIDTHS), st.integers(0, 8), st.integers(1, 40), st.integers(1, 150))
@settings(max_examples=60, deadline=None)
def test_transformed_rows_are_read_as_numpy_reads_them(seed, width, most_bits, directions, samples):
    rng = np.random.default_rng(seed)
    packed = whole(transformed(rng, width, int(rng.integers(1, 600)), most_bits, directions), rng)
    agree(packed, rng.integers(-2, packed.rows + 2, (samples, 4)), 1e-4 * directions)


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("directions", [1, 2, 16, 17, 255])
def test_every_number_of_bits_is_read(bits, directions):
    rng = np.random.default_rng(bits)
    basis = rng.integers(-127, 128, (directions, 17)).astype(np.int8)
    section = Section(0, coder(np.full((1, directions), bits), np.full((1, directions), 0.01)), basis)
    codes = rng.integers(0, 1 << bits, (70, directions)).astype(np.uint8)
    arrays = encode_transform([section], [np.zeros(70, int)], [codes])
    packed = whole(TransformBlock("all", 0, 70, 0, 17, "transform", arrays=arrays), rng)
    agree(packed, np.arange(-1, 71)[:, None], 1e-4 * directions)


@pytest.mark.parametrize("step", [0, 1, 256, 512])
def test_rows_that_many_samples_ask_for_are_read_once_and_copied(step):
    rng = np.random.default_rng(step)
    packed = whole(transformed(rng, 17, 600, 6, 17), rng)
    rows = np.stack([step * rng.integers(0, 4, 500), rng.integers(0, 40, 500), np.full(500, -1)], axis=1)
    agree(packed, rows, 1e-3)


@given(st.integers(0, 2**32 - 1), st.sampled_from(WIDTHS), st.integers(0, 3), st.integers(0, len(CODES)))
@settings(max_examples=60, deadline=None)
def test_trellised_rows_are_read_as_numpy_reads_them(seed, width, planes, rest):
    rng = np.random.default_rng(seed)
    packed = whole(trellised(rng, width, planes, rest), rng)
    agree(packed, rng.integers(-2, packed.rows + 2, (int(rng.integers(1, 100)), 3)), 1e-4)


@pytest.mark.parametrize("rate", range(1, len(CODES) + 1))
def test_pairs_of_steps_are_steps(rate):
    rng = np.random.default_rng(rate)
    for width in (1, 7, 64, 65):
        packed = whole(trellised(rng, width, 0, rate), rng)
        agree(packed, np.arange(packed.rows)[:, None], 1e-4)


def test_a_read_only_or_empty_array_is_as_good():
    rng = np.random.default_rng(0)
    packed = whole(transformed(rng, 17, 50, 5, 17), rng)
    rows = rng.integers(0, 150, (9, 3))
    fields = np.arange(3, dtype=np.int32)
    expected = packed.lookup(rows, fields)
    rows.flags.writeable = fields.flags.writeable = False
    assert_array_equal(packed.lookup(rows, fields), expected)
    assert packed.lookup(rows[:0], fields).shape == (0, 3, 17)
    assert packed.lookup(rows[:, :0], fields[:0]).shape == (9, 0, 17)
    with pytest.raises(ConfigError, match="`fields` must lie"):
        packed.lookup(rows, fields + np.int32(1))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_damaged_places_are_read_alike(seed):
    rng = np.random.default_rng(seed)
    for block in (transformed(rng, 17, 300, 8, 17), trellised(rng, 17, 2, 4)):
        offsets = block.arrays["offsets"].copy()
        offsets[::2] = rng.choice([2**32 - 1, 10**6, 8 * len(block.arrays["codes"]) - 40], len(offsets[::2]))
        damaged = replace(block, arrays={**block.arrays, "offsets": offsets})
        agree(whole(damaged, rng), np.arange(block.rows)[:, None], 1e-3)
