"""Packed layouts: every reader against one oracle, exact sizes, error bounds, damaged arrays."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from inspect import isabstract

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.errors import ArtifactError, ConfigError, DivergedError
from pocketrec.format import layouts
from pocketrec.format.block import DTYPES, FileBlock, PackedRange, side_size_for
from pocketrec.format.entries import PackedBlock, size_for
from pocketrec.format.layouts.quantised import QuantisedBlock
from pocketrec.format.packed import Packed
from pocketrec.native import library

STORAGES = ("fp32", "fp16", "int8")
INDEXES = ("compact", "direct")


class Case:
    """A random table: fields of various sizes, one or two blocks side by side or one above the other."""

    def __init__(self, seed: int, sizes: list[int], widths: list[int], rate: float, stacked: bool = False) -> None:
        rng = np.random.default_rng(seed)
        self.fields = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        n, width = len(self.fields), max(widths) if stacked else sum(widths)
        self.weight = rng.normal(size=(n, width)).astype(np.float32)
        self.keep = rng.random((n, width)) < rate * rng.random((n, 1)) * 2
        self.weight[rng.random((n, width)) < 0.05] = 0.0
        self.fill = rng.normal(size=(len(sizes), width)).astype(np.float32)
        self.absent = np.where(rng.random((len(sizes), 1)) < 0.5, self.fill, self.fill + 1).astype(np.float32)
        if stacked:
            stop = int(np.cumsum(sizes)[0])
            bounds = [(0, stop, 0, widths[0]), (stop, n, 0, widths[-1])]
        else:
            edges = np.concatenate([[0], np.cumsum(widths)])
            bounds = [(0, n, int(a), int(b)) for a, b in itertools.pairwise(edges)]
        self.blocks = tuple(PackedRange(f"block{i}", *b) for i, b in enumerate(bounds))

    def expected(self) -> np.ndarray:
        covered = np.zeros(self.keep.shape, bool)
        for b in self.blocks:
            covered[b.start : b.stop, b.left : b.right] = True
        kept = self.keep & covered
        out = np.where(kept, self.weight, self.fill[self.fields])
        return np.where(kept.any(axis=1, keepdims=True), out, self.absent[self.fields])

    def pack(self, storage: str, dense: bool = False, index: str = "compact") -> Packed:
        keep = None if dense else self.keep
        packed = Packed.encode(
            self.weight, keep, self.fill, self.absent, self.blocks, self.fields, storage=storage, index=index
        )
        return Packed.from_arrays(json.loads(json.dumps(packed.meta())), packed.arrays())


def tolerance(case: Case, storage: str) -> np.ndarray:
    """Largest round-trip error allowed, per field and column."""
    if storage == "fp32":
        return np.zeros_like(case.fill)
    if storage == "fp16":
        return np.full_like(case.fill, 2.0**-11 * np.abs(case.weight).max())
    largest = np.zeros_like(case.fill)
    np.maximum.at(largest, case.fields, np.abs(case.weight) * case.keep)
    return largest / 254 * (1 + 1e-5)


def read_all(packed: Packed, fields: np.ndarray, reader: str = "lookup") -> np.ndarray:
    """Every row with its own field, one sample per row."""
    return np.stack([getattr(packed, reader)(np.array([[r]]), fields[r : r + 1])[0, 0] for r in range(len(fields))])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    stacked = draw(st.booleans())
    sizes = draw(st.lists(st.integers(1, 40), min_size=2 if stacked else 1, max_size=4))
    widths = draw(st.lists(st.sampled_from([1, 2, 7, 8, 9, 16, 17, 24, 33, 64, 70]), min_size=1, max_size=3))
    rate = draw(st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0]))
    return Case(draw(st.integers(0, 2**31)), sizes, [max(widths)] if stacked else widths, rate, stacked)


@settings(max_examples=60, deadline=None)
@given(case=cases(), storage=st.sampled_from(STORAGES), index=st.sampled_from(INDEXES))
def test_round_trip_is_within_the_bound_of_the_storage(case: Case, storage: str, index: str) -> None:
    packed = case.pack(storage, index=index)
    error = np.abs(read_all(packed, case.fields, "lookup_numpy") - case.expected())
    assert (error <= tolerance(case, storage)[case.fields]).all()
    counts = [int(case.keep[b.start : b.stop, b.left : b.right].sum()) for b in case.blocks]
    assert [b.arrays["values"].size for b in packed.blocks] == counts


@settings(max_examples=120, deadline=None)
@given(
    case=cases(),
    storage=st.sampled_from(STORAGES),
    dense=st.booleans(),
    index=st.sampled_from(INDEXES),
    threads=st.integers(1, 3),
)
def test_kernel_reads_exactly_what_numpy_reads(case: Case, storage: str, dense: bool, index: str, threads: int) -> None:
    packed = case.pack(storage, dense, index)
    rng = np.random.default_rng(0)
    rows = rng.integers(-3, packed.rows + 3, size=(70, 5))
    rows[0] = [-(2**62), 2**62, packed.rows, -1, 0]
    fields = rng.integers(0, len(case.fill), size=5)
    expected = packed.lookup_numpy(rows, fields)
    for most in library.LEVELS:
        library.limit(most)
        assert np.array_equal(packed.lookup(rows, fields, threads=threads), expected)
    library.limit(library.LEVELS[-1])


@settings(max_examples=60, deadline=None)
@given(case=cases(), storage=st.sampled_from(STORAGES), index=st.sampled_from(INDEXES))
def test_size_formula_is_exact(case: Case, storage: str, index: str) -> None:
    packed = case.pack(storage, index=index)
    expected = 0
    for b in case.blocks:
        kept = case.keep[b.start : b.stop, b.left : b.right]
        counts = (len(kept), int(kept.any(axis=1).sum()), int(kept.sum()))
        expected += size_for(*counts, b.right - b.left, len(case.fill), storage, index)
    own = int((case.absent != case.fill).any(axis=1).sum())
    assert packed.size_bytes == expected + side_size_for(*case.fill.shape, own)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("index", INDEXES)
def test_large_blocks_use_every_directory_entry(storage: str, index: str) -> None:
    case = Case(1, [5000, 3000], [16, 1], 0.3)
    packed = case.pack(storage, index=index)
    sizes = {name: a.size for name, a in packed.blocks[0].arrays.items()}
    assert sizes["records"] == 8000 * 6 if index == "direct" else sizes["rank"] == 8
    rows = np.arange(packed.rows).reshape(-1, 1)
    for f, part in enumerate([rows[:5000], rows[5000:]]):
        got = packed.lookup(part, np.array([f]))[:, 0]
        assert (np.abs(got - case.expected()[part[:, 0]]) <= tolerance(case, storage)[f]).all()
        assert np.array_equal(got, packed.lookup_numpy(part, np.array([f]))[:, 0])


@pytest.mark.parametrize("index", INDEXES)
def test_rows_choose_and_order_what_is_stored(index: str) -> None:
    case = Case(2, [30, 20], [4, 1], 0.5)
    rows = np.concatenate([np.arange(30)[::-3], 30 + np.arange(20)[::-2]])
    tables = (case.weight, case.keep, case.fill, case.absent, case.blocks, case.fields, rows)
    packed = Packed.encode(*tables, index=index)
    assert np.array_equal(read_all(packed, case.fields[rows]), case.expected()[rows])


def test_rows_of_a_block_must_come_together() -> None:
    case = Case(2, [30, 20], [4], 0.5, stacked=True)
    with pytest.raises(ConfigError, match="together"):
        Packed.encode(
            case.weight, case.keep, case.fill, case.absent, case.blocks, case.fields, np.array([0, 31, 1])
        )  # fmt: skip


@pytest.mark.parametrize("index", INDEXES)
def test_a_row_kept_in_one_block_reads_fill_in_the_others(index: str) -> None:
    weight = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    keep = np.array([[0, 0, 1], [0, 0, 0]], bool)
    fill, absent = np.array([[7, 8, 9]], np.float32), np.array([[-1, -2, -3]], np.float32)
    blocks = (PackedRange("embedding", 0, 2, 0, 2), PackedRange("linear", 0, 2, 2, 3))
    packed = Packed.encode(weight, keep, fill, absent, blocks, np.zeros(2, np.int32), index=index)
    got = packed.lookup(np.array([[0], [1], [-1], [2]]), np.zeros(1, np.int32))[:, 0]
    assert got.tolist() == [[7, 8, 3], [-1, -2, -3], [-1, -2, -3], [-1, -2, -3]]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_kept_zero_stays_zero_and_stays_kept(storage: str) -> None:
    weight = np.array([[0.0, 1.0], [0.0, 0.0]], np.float32)
    keep = np.array([[1, 1], [1, 0]], bool)
    fill = np.full((1, 2), 5, np.float32)
    packed = Packed.encode(
        weight, keep, fill, fill, (PackedRange("e", 0, 2, 0, 2),), np.zeros(2, np.int32), storage=storage
    )  # fmt: skip
    assert packed.lookup(np.array([[0], [1]]), np.zeros(1, np.int32))[:, 0].tolist() == [[0, 1], [0, 5]]


def test_columns_of_no_block_read_fill() -> None:
    weight = np.ones((2, 3), np.float32)
    fill = np.full((1, 3), 4, np.float32)
    packed = Packed.encode(
        weight, np.ones((2, 3), bool), fill, fill, (PackedRange("e", 0, 2, 1, 2),), np.zeros(2, np.int32)
    )
    assert packed.lookup(np.array([[0]]), np.zeros(1, np.int32)).tolist() == [[[4, 1, 4]]]


def test_empty_inputs() -> None:
    case = Case(3, [4], [3], 0.0)
    packed = Packed.encode(
        case.weight, case.keep, case.fill, case.absent, case.blocks, case.fields, np.empty(0, np.int64), "int8"
    )
    assert packed.rows == 0
    assert packed.lookup(np.empty((0, 1), np.int64), np.zeros(1, np.int32)).shape == (0, 1, 3)
    assert np.array_equal(packed.lookup(np.array([[0]]), np.zeros(1, np.int32))[0], case.absent)


def test_out_is_written_and_returned() -> None:
    case = Case(4, [9], [3], 0.5)
    packed = case.pack("fp32")
    rows, fields, out = np.arange(9).reshape(9, 1), np.zeros(1, np.int32), np.empty((9, 1, 3), np.float32)
    assert packed.lookup(rows, fields, out=out) is out
    assert np.array_equal(out[:, 0], case.expected())
    with pytest.raises(ConfigError, match="`out` must be contiguous float32"):
        packed.lookup(rows, fields, out=out[:, :, :2])


@pytest.mark.parametrize("field", [-1, 2])
def test_a_field_out_of_range_is_an_error(field: int) -> None:
    packed = Case(5, [3, 3], [2], 0.5).pack("fp32")
    for reader in (packed.lookup, packed.lookup_numpy):
        with pytest.raises(ConfigError, match=r"`fields` must lie in \[0, 2\)"):
            reader(np.zeros((1, 1), np.int64), np.array([field]))


def test_bad_values_and_settings() -> None:
    case = Case(6, [3], [2], 1.0)
    arguments = (case.fill, case.absent, case.blocks, case.fields)
    with pytest.raises(DivergedError, match="finite"):
        Packed.encode(case.weight * np.float32(np.nan), None, *arguments)
    with pytest.raises(ConfigError, match="65,504"):
        Packed.encode(case.weight + np.float32(1e6), None, *arguments, storage="fp16")
    with pytest.raises(ConfigError, match="`storage` must be one of"):
        Packed.encode(case.weight, None, *arguments, storage="int3")
    with pytest.raises(ConfigError, match="`index` must be one of"):
        Packed.encode(case.weight, None, *arguments, index="hashed")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("damage", ["missing", "longer", "retyped"])
def test_a_misshapen_array_is_an_artifact_error(storage: str, index: str, damage: str) -> None:
    packed = Case(7, [2000, 30], [16, 1], 0.2).pack(storage, index=index)
    for name, array in packed.arrays().items():
        others = {other: a for other, a in packed.arrays().items() if other != name}
        if damage == "longer" and (name == "fill" or name.endswith("values")):
            continue
        if damage == "missing" and name == "absent":
            continue
        damaged = {
            "missing": {},
            "longer": {name: np.concatenate([array, array[:1]])},
            "retyped": {name: array.astype(np.float64)},
        }[damage]
        with pytest.raises(ArtifactError):
            Packed.from_arrays(packed.meta(), others | damaged)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(["presence", "rank", "masks", "offsets", "records"]),
    width=st.sampled_from([13, 33]),
)
def test_damaged_directories_never_read_out_of_bounds(seed: int, name: str, width: int) -> None:
    packed = Case(8, [3000], [width], 0.2).pack("fp16", index="direct" if name == "records" else "compact")
    block = packed.blocks[0]
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, size=block.arrays[name].nbytes, dtype=np.uint8).view(block.arrays[name].dtype)
    damaged = replace(packed, blocks=(replace(block, arrays={**block.arrays, name: noise}),))
    for most in library.LEVELS:
        library.limit(most)
        found = damaged.lookup(np.arange(3000).reshape(-1, 1), np.zeros(1, np.int32))
        assert found.shape == (3000, 1, width)
        if name == "records":
            assert np.array_equal(found, damaged.lookup_numpy(np.arange(3000).reshape(-1, 1), np.zeros(1, np.int32)))
    library.limit(library.LEVELS[-1])


def test_stored_types_are_what_the_storage_says() -> None:
    for storage in STORAGES:
        block = Case(9, [100], [8], 0.5).pack(storage).blocks[0]
        assert block.arrays["values"].dtype == DTYPES[storage]
        assert block.size_bytes == sum(a.nbytes for a in block.arrays.values())


@pytest.mark.parametrize("name", layouts.NAMES)
def test_every_module_of_the_folder_is_a_layout(name: str) -> None:
    cls = layouts.block_class(name)
    assert issubclass(cls, FileBlock)
    assert not isabstract(cls)
    assert (cls.__module__, cls.__name__.lower()) == (f"{layouts.__name__}.{name}", f"{name.replace('_', '')}block")


@pytest.mark.parametrize(
    "name", ["computed", "__init__", "product.py", ".product", "..block", "os", "", "Transform", 7]
)
def test_a_layout_outside_the_folder_is_refused_and_never_imported(name: object, monkeypatch) -> None:
    monkeypatch.setattr(layouts, "import_module", None)
    packed = Case(9, [9], [8], 0.5).pack("fp16")
    meta = packed.meta()
    meta["blocks"][0]["layout"] = name
    with pytest.raises(ArtifactError, match=r"must have a layout of .*; update PocketRec"):
        Packed.from_arrays(meta, packed.arrays())


def test_blocks_of_two_kinds_are_read_by_numpy() -> None:
    arrays = {
        "codes": np.array([[0], [3], [2]], np.uint8),
        "low": np.zeros((1, 1), np.float32),
        "step": np.ones((1, 1), np.float32),
    }
    coded = QuantisedBlock("coded", 0, 3, 1, 2, "quantised", 2, arrays=arrays)
    plain = PackedBlock("plain", 0, 3, 0, 1, "dense", "fp32", 64, arrays={"values": np.arange(3, dtype=np.float32)})
    zeros = np.zeros((1, 2), np.float32)
    rows, fields = np.arange(3)[:, None], np.zeros(1, np.int32)
    for blocks in ((plain, coded), (coded, plain)):
        packed = Packed(3, blocks, zeros, zeros)
        assert packed._view is None
        assert packed.lookup(rows, fields)[:, 0].tolist() == [[0, 0], [1, 3], [2, 2]]
