"""The compiled kernel against numpy and brute force, at every instruction set; the build without a compiler."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.errors import ConfigError, DataError
from pocketrec.format.layouts import transform, trellis  # noqa: F401 - as well
from pocketrec.native import library, sparse, topk
from pocketrec.training import row_adam  # noqa: F401 - declares its structures

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "pocketrec" / "native" / "src"


def random_csr(rng: np.random.Generator, rows: int, columns: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    matrix = rng.random((rows, columns)) < rate
    indptr = np.concatenate([[0], np.cumsum(matrix.sum(axis=1))]).astype(np.int64)
    return indptr, np.nonzero(matrix)[1].astype(np.int32)


def to_dense(indptr: np.ndarray, indices: np.ndarray, columns: int) -> np.ndarray:
    dense = np.zeros((len(indptr) - 1, columns), np.float64)
    dense[np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)), indices] = 1
    return dense


@pytest.mark.parametrize("width", [1, 5, 16, 31, 64, 70, 130])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7])
def test_spmm_is_the_scaled_product(implementation: str, width: int, rate: float) -> None:
    rng = np.random.default_rng(width)
    indptr, indices = random_csr(rng, 83, 57, rate)
    x = rng.normal(size=(57, width)).astype(np.float32)
    left, right = rng.random(83).astype(np.float32), rng.random(57).astype(np.float32)
    add = rng.normal(size=(83, width)).astype(np.float32)
    expected = left[:, None] * (to_dense(indptr, indices, 57) @ (right[:, None] * x)) + add
    found = sparse.spmm(indptr, indices, x, left=left, right=right, add=add)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    rows = rng.integers(0, 83, size=20)
    subset = sparse.spmm(indptr, indices, x, left=left, right=right, rows=rows, threads=3)
    np.testing.assert_allclose(subset, (expected - add)[rows], atol=2e-5)


def test_spmm_does_not_depend_on_threads_or_rows() -> None:
    rng = np.random.default_rng(0)
    indptr, indices = random_csr(rng, 3000, 200, 0.1)
    x = rng.normal(size=(200, 64)).astype(np.float32)
    one = sparse.spmm(indptr, indices, x)
    assert np.array_equal(one, sparse.spmm(indptr, indices, x, threads=4))
    rows = np.arange(0, 3000, 7)
    assert np.array_equal(one[rows], sparse.spmm(indptr, indices, x, rows=rows))


def test_spmm_reads_and_writes_bfloat16(implementation: str) -> None:
    rng = np.random.default_rng(1)
    indptr, indices = random_csr(rng, 40, 30, 0.3)
    x = torch.from_numpy(rng.normal(size=(30, 37)).astype(np.float32)).bfloat16()
    bits = x.view(torch.uint16).numpy()
    product = to_dense(indptr, indices, 30) @ x.double().numpy()
    wide = sparse.spmm(indptr, indices, bits, out=np.empty((40, 37), np.float32))
    np.testing.assert_allclose(wide, product, atol=2e-5)
    narrow = sparse.bf16_to_fp32(sparse.spmm(indptr, indices, bits))
    np.testing.assert_allclose(narrow, product, rtol=2**-8, atol=1e-5)
    assert np.array_equal(sparse.spmm(indptr, indices, bits), sparse.fp32_to_bf16(wide))


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_bfloat16_conversion_is_torchs(values: list[float]) -> None:
    x = np.array(values, np.float32)
    with np.errstate(invalid="ignore"):
        found = sparse.bf16_to_fp32(sparse.fp32_to_bf16(x))
    assert np.array_equal(found, torch.from_numpy(x).bfloat16().float().numpy(), equal_nan=True)


def break_index(indptr: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> None:
    indices[3] = 57


def break_sign(indptr: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> None:
    indices[3] = -1


def break_end(indptr: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> None:
    indptr[-1] = len(indices) + 1


def break_row(indptr: np.ndarray, indices: np.ndarray, rows: np.ndarray) -> None:
    rows[0] = 83


@pytest.mark.parametrize("damage", [break_index, break_sign, break_end, break_row])
def test_spmm_refuses_indices_out_of_range(implementation: str, damage: Callable[..., None]) -> None:
    indptr, indices = random_csr(np.random.default_rng(2), 83, 57, 0.2)
    rows = np.arange(83)
    damage(indptr, indices, rows)
    with pytest.raises(DataError, match="must lie inside"):
        sparse.spmm(indptr, indices, np.ones((57, 4), np.float32), rows=rows)


def test_spmm_refuses_other_types() -> None:
    indptr, indices = random_csr(np.random.default_rng(2), 5, 5, 0.2)
    with pytest.raises(ConfigError, match="`x` must be contiguous float32 or uint16"):
        sparse.spmm(indptr, indices, np.ones((5, 4)))


def brute_force_topk(scores: np.ndarray, seen: np.ndarray, k: int) -> np.ndarray:
    """Sort every item by (score descending, id ascending)."""
    best = np.full((len(scores), k), -1)
    for u, row in enumerate(scores):
        order = [i for i in sorted(range(len(row)), key=lambda i: (-row[i], i)) if not seen[u, i]][:k]
        best[u, : len(order)] = order
    return best


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), users=st.integers(0, 140), items=st.integers(1, 90), k=st.integers(1, 100),
    width=st.sampled_from([1, 3, 16, 20]), rate=st.sampled_from([0.0, 0.2, 1.0]),
)  # fmt: skip
def test_topk_is_the_sorted_list_with_ties_by_id(
    seed: int, users: int, items: int, k: int, width: int, rate: float
) -> None:
    rng = np.random.default_rng(seed)
    u = rng.integers(-2, 3, size=(users, width)).astype(np.float32)
    v = rng.integers(-2, 3, size=(items, width)).astype(np.float32)
    indptr, indices = random_csr(rng, users, items, rate)
    expected = brute_force_topk(u @ v.T, to_dense(indptr, indices, items) > 0, k)
    for most in library.LEVELS:
        library.limit(most)
        ids, scores = topk.topk(u, v, indptr, indices, k, threads=2)
        assert np.array_equal(ids, expected)
        held = np.take_along_axis(u @ v.T, np.maximum(ids, 0), axis=1)
        assert np.array_equal(scores, np.where(ids < 0, -np.inf, held))
    library.limit(library.LEVELS[-1])
    assert np.array_equal(topk._topk_numpy(u, v, indptr, indices, k)[0], expected)


def test_topk_has_the_same_bits_whatever_the_block_and_the_threads(implementation: str) -> None:
    rng = np.random.default_rng(3)
    u, v = rng.normal(size=(200, 64)).astype(np.float32), rng.normal(size=(500, 64)).astype(np.float32)
    indptr, indices = random_csr(rng, 200, 500, 0.05)
    ids, scores = topk.topk(u, v, indptr, indices, 20, threads=3)
    whole = topk.topk(u, v, indptr, indices, 20)
    assert np.array_equal(ids, whole[0])
    assert np.array_equal(scores, whole[1])
    for begin, end in ((0, 1), (5, 72), (199, 200)):
        part = topk.topk(u[begin:end], v, indptr[begin : end + 1], indices, 20)
        assert np.array_equal(part[0], ids[begin:end])
        if implementation != "numpy":
            assert np.array_equal(part[1], scores[begin:end])
    reference = u.astype(np.float64) @ v.T.astype(np.float64)
    np.testing.assert_allclose(scores, np.take_along_axis(reference, ids, axis=1), atol=1e-4)


def test_topk_never_ranks_nan(implementation: str) -> None:
    items = np.array([[1.0], [np.nan], [3.0]], np.float32)
    ids, _ = topk.topk(np.ones((1, 1), np.float32), items, None, None, 3)
    assert ids.tolist() == [[2, 0, -1]]


def test_topk_refuses_bad_input(implementation: str) -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ConfigError, match="`k` must be at least 1"):
        topk.topk(x, x, None, None, 0)
    with pytest.raises(DataError, match="must lie inside"):
        topk.topk(x, x, np.array([0, 1, 2]), np.array([0, 2], np.int32), 1)
    with pytest.raises(DataError, match="must ascend"):
        topk.topk(x, x, np.array([0, 2, 2]), np.array([1, 0], np.int32), 1)


def in_environment(value: str | None, code: str) -> str:
    """What a new process says whose environment caps the library."""
    kept = {name: v for name, v in os.environ.items() if name != library.VARIABLE}
    environment = kept | {"PYTHONPATH": str(ROOT / "src")} | ({} if value is None else {library.VARIABLE: value})
    command = [sys.executable, "-c", f"from pocketrec.native import library\n{code}"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def test_the_environment_caps_the_level() -> None:
    best = in_environment(None, "print(library.level())")
    assert best == in_environment("", "print(library.level())")
    assert in_environment("off", "print(library.available(), library.level())") == "False None"
    reachable = library.LEVELS[: library.LEVELS.index(best) + 1] if best in library.LEVELS else ()
    for most in reachable:
        assert in_environment(most, "library.limit('vnni'); print(library.level())") == most
    below = "library.limit('portable'); print(library.level())"
    assert in_environment("avx2", below) == ("portable" if reachable else "None")


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "avx1024")
    with pytest.raises(ConfigError, match=r"one of off, portable, avx2, avx512, vnni, but is 'avx1024'; unset it"):
        library._opened.__wrapped__()


def reopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: nothing was opened and nothing said yet."""
    for name in ("_opened", "_library", "_refuse"):
        monkeypatch.setattr(library, name, cache(getattr(library, name).__wrapped__))


def fall_back(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The library is refused with one warning, and numpy does its work."""
    reopened(monkeypatch)
    with pytest.warns(RuntimeWarning, match=rf"\({what}\).*build it again: `pip install \.`") as caught:
        assert not library.available()
    assert len(caught) == 1
    assert library.level() is None
    assert sparse.spmm(np.array([0, 1]), np.array([0], np.int32), np.ones((1, 2), np.float32)).tolist() == [[1, 1]]


needs_library = pytest.mark.skipif(not library.available(), reason="there is no compiled library")


@needs_library
@pytest.mark.parametrize(
    ("name", "declared", "what"),
    [
        ("pocketrec_of_tomorrow", ([], library.INT), "it has no pocketrec_of_tomorrow"),
        ("pocketrec_level", ([library.INT], library.INT), "it has another pocketrec_level"),
        ("pocketrec_adam_distinct", ([*[library.POINTER] * 6], library.LONG), "it has another pocketrec_adam_distinct"),
        ("pocketrec_limit", ([library.INT], library.INT), "it has another pocketrec_limit"),
    ],
)
def test_a_library_with_other_functions_is_refused(monkeypatch, name: str, declared: tuple, what: str) -> None:
    monkeypatch.setattr(library, "_FUNCTIONS", {**library._FUNCTIONS, name: declared})
    fall_back(monkeypatch, what)


def rename(fields: list) -> None:
    fields[0] = ("another", fields[0][1])


def retype(fields: list) -> None:
    place = next(i for i, (_, kind) in enumerate(fields) if kind is library.LONG)
    fields[place] = (fields[place][0], ctypes.c_uint64)


def exchange(fields: list) -> None:
    fields[0], fields[1] = fields[1], fields[0]


def lengthen(fields: list) -> None:
    fields.append(("more", library.LONG))


@needs_library
@pytest.mark.parametrize("change", [rename, retype, exchange, lengthen])
@pytest.mark.parametrize("name", ["Block", "Lookup", "Part", "Transform", "Trellis", "TrellisCode", "Rows"])
def test_a_library_with_another_structure_is_refused(monkeypatch, change: Callable[[list], None], name: str) -> None:
    fields = list(library._STRUCTURES[name]._fields_)
    change(fields)
    other = type("Other", (ctypes.Structure,), {"_fields_": fields})
    monkeypatch.setattr(library, "_STRUCTURES", {**library._STRUCTURES, name: other})
    fall_back(monkeypatch, f"it has another {name}")


@needs_library
def test_a_structure_that_is_declared_later_is_compared_too(monkeypatch) -> None:
    known = {"Block": library._STRUCTURES["Block"]}
    monkeypatch.setattr(library, "_STRUCTURES", known)
    reopened(monkeypatch)
    assert library.available()
    library.structure("Rule")(type("Rule", (ctypes.Structure,), {"_fields_": [("rate", ctypes.c_float)]}))
    with pytest.warns(RuntimeWarning, match="it has another Rule"):
        assert not library.available()


@needs_library
def test_every_structure_of_the_header_is_declared() -> None:
    header = (SOURCES / "abi.h").read_text()
    assert set(re.findall(r"EACH\((\w+), POCKETREC_", header)) == set(library._STRUCTURES)
    assert set(re.findall(r"EACH\((pocketrec_\w+)\)", header)) == set(library._FUNCTIONS)


STALE = """
import sys, warnings
from importlib.machinery import ModuleSpec
import numpy as np
from pocketrec.format.block import PackedRange
from pocketrec.format.layouts import trellis
from pocketrec.format.packed import Packed
library.find_spec = lambda name: ModuleSpec(name, None, origin={path!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    table, fill = np.arange(6, dtype=np.float32).reshape(3, 2), np.zeros((1, 2), np.float32)
    packed = Packed.encode(table, None, fill, fill, (PackedRange("all", 0, 3, 0, 2),), np.zeros(3, np.int32))
    assert packed.lookup(np.array([[2], [0]]), np.zeros(1, np.int32)).tolist() == [[[4, 5]], [[0, 1]]]
print(library.available(), *(w.message for w in caught))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_library_of_the_same_names_and_sizes_but_another_order_is_refused(tmp_path: Path) -> None:
    shutil.copytree(SOURCES, tmp_path / "src")
    header = tmp_path / "src" / "abi.h"
    start, bits = "FIELD(int64_t, user_start)", "FIELD(int64_t, user_bits)"
    text = header.read_text().replace(f"{start} {bits}", f"{bits} {start}")
    assert text != header.read_text()
    header.write_text(text)
    sources = [str(tmp_path / "src" / name) for name in ("exports.cpp", "adam.cpp")]
    path = str(tmp_path / "stale.so")
    subprocess.run(["g++", "-O0", "-std=c++17", "-pthread", "-fPIC", "-shared", "-o", path, *sources], check=True)
    told = in_environment(None, STALE.format(path=path))
    assert told.startswith(f"False {path} was compiled from other sources than these (it has another Trellis)")
    assert told.count("build it again") == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_kernel_is_built_where_a_compiler_is() -> None:
    assert in_environment(None, "print(library.available())") == "True", "run `python setup.py build_ext --inplace`"


def test_a_broken_compiler_does_not_break_the_build(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", f"--build-lib={tmp_path / 'lib'}"]
    environment = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    source = tmp_path / "source"
    shutil.copytree(SOURCES, source / SOURCES.relative_to(ROOT))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "src" / "pocketrec" / "__init__.py").touch()
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    assert not list(tmp_path.rglob("*.so"))
