"""The compiled kernel against numpy and brute force, at every instruction set; the build without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec import kernel
from pocketrec.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[*kernel.LEVELS, "numpy"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn (capped at what the processor has), then numpy."""
    if request.param == "numpy":
        monkeypatch.setattr(kernel, "_library", lambda: None)
    else:
        kernel.limit(request.param)
    yield request.param
    kernel.limit(kernel.LEVELS[-1])


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
    found = kernel.spmm(indptr, indices, x, left=left, right=right, add=add)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    rows = rng.integers(0, 83, size=20)
    subset = kernel.spmm(indptr, indices, x, left=left, right=right, rows=rows, threads=3)
    np.testing.assert_allclose(subset, (expected - add)[rows], atol=2e-5)


def test_spmm_does_not_depend_on_threads_or_rows() -> None:
    rng = np.random.default_rng(0)
    indptr, indices = random_csr(rng, 3000, 200, 0.1)
    x = rng.normal(size=(200, 64)).astype(np.float32)
    one = kernel.spmm(indptr, indices, x)
    assert np.array_equal(one, kernel.spmm(indptr, indices, x, threads=4))
    rows = np.arange(0, 3000, 7)
    assert np.array_equal(one[rows], kernel.spmm(indptr, indices, x, rows=rows))


def test_spmm_reads_and_writes_bfloat16(implementation: str) -> None:
    rng = np.random.default_rng(1)
    indptr, indices = random_csr(rng, 40, 30, 0.3)
    x = torch.from_numpy(rng.normal(size=(30, 37)).astype(np.float32)).bfloat16()
    bits = x.view(torch.uint16).numpy()
    product = to_dense(indptr, indices, 30) @ x.double().numpy()
    wide = kernel.spmm(indptr, indices, bits, out=np.empty((40, 37), np.float32))
    np.testing.assert_allclose(wide, product, atol=2e-5)
    narrow = kernel.bf16_to_fp32(kernel.spmm(indptr, indices, bits))
    np.testing.assert_allclose(narrow, product, rtol=2**-8, atol=1e-5)
    assert np.array_equal(kernel.spmm(indptr, indices, bits), kernel.fp32_to_bf16(wide))


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_bfloat16_conversion_is_torchs(values: list[float]) -> None:
    x = np.array(values, np.float32)
    with np.errstate(invalid="ignore"):
        found = kernel.bf16_to_fp32(kernel.fp32_to_bf16(x))
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
        kernel.spmm(indptr, indices, np.ones((57, 4), np.float32), rows=rows)


def test_spmm_refuses_other_types() -> None:
    indptr, indices = random_csr(np.random.default_rng(2), 5, 5, 0.2)
    with pytest.raises(ConfigError, match="`x` must be contiguous float32 or uint16"):
        kernel.spmm(indptr, indices, np.ones((5, 4)))


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
    for most in kernel.LEVELS:
        kernel.limit(most)
        ids, scores = kernel.topk(u, v, indptr, indices, k, threads=2)
        assert np.array_equal(ids, expected)
        held = np.take_along_axis(u @ v.T, np.maximum(ids, 0), axis=1)
        assert np.array_equal(scores, np.where(ids < 0, -np.inf, held))
    kernel.limit(kernel.LEVELS[-1])
    assert np.array_equal(kernel._topk_numpy(u, v, indptr, indices, k)[0], expected)


def test_topk_has_the_same_bits_whatever_the_block_and_the_threads(implementation: str) -> None:
    rng = np.random.default_rng(3)
    u, v = rng.normal(size=(200, 64)).astype(np.float32), rng.normal(size=(500, 64)).astype(np.float32)
    indptr, indices = random_csr(rng, 200, 500, 0.05)
    ids, scores = kernel.topk(u, v, indptr, indices, 20, threads=3)
    whole = kernel.topk(u, v, indptr, indices, 20)
    assert np.array_equal(ids, whole[0])
    assert np.array_equal(scores, whole[1])
    for begin, end in ((0, 1), (5, 72), (199, 200)):
        part = kernel.topk(u[begin:end], v, indptr[begin : end + 1], indices, 20)
        assert np.array_equal(part[0], ids[begin:end])
        if implementation != "numpy":
            assert np.array_equal(part[1], scores[begin:end])
    reference = u.astype(np.float64) @ v.T.astype(np.float64)
    np.testing.assert_allclose(scores, np.take_along_axis(reference, ids, axis=1), atol=1e-4)


def test_topk_never_ranks_nan(implementation: str) -> None:
    items = np.array([[1.0], [np.nan], [3.0]], np.float32)
    ids, _ = kernel.topk(np.ones((1, 1), np.float32), items, None, None, 3)
    assert ids.tolist() == [[2, 0, -1]]


def test_topk_refuses_bad_input(implementation: str) -> None:
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ConfigError, match="`k` must be at least 1"):
        kernel.topk(x, x, None, None, 0)
    with pytest.raises(DataError, match="must lie inside"):
        kernel.topk(x, x, np.array([0, 1, 2]), np.array([0, 2], np.int32), 1)
    with pytest.raises(DataError, match="must ascend"):
        kernel.topk(x, x, np.array([0, 2, 2]), np.array([1, 0], np.int32), 1)


def test_environment_switches_the_kernel_off() -> None:
    code = "from pocketrec import kernel; raise SystemExit(kernel.available() or kernel.level() is not None)"
    environment = os.environ | {"POCKETREC_KERNEL": "0", "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_library_of_other_sources_warns_once_and_leaves_the_work_to_numpy(monkeypatch) -> None:
    if not kernel.available():
        pytest.skip("there is no compiled library")
    monkeypatch.setattr(kernel, "_SIGNATURES", {**kernel._SIGNATURES, "pocketrec_of_tomorrow": []})
    monkeypatch.setattr(kernel, "_library", cache(kernel._library.__wrapped__))
    with pytest.warns(RuntimeWarning, match=r"no pocketrec_of_tomorrow.*build it again") as caught:
        assert not kernel.available()
    assert kernel.spmm(np.array([0, 1]), np.array([0], np.int32), np.ones((1, 2), np.float32)).tolist() == [[1, 1]]
    assert kernel.level() is None
    assert len(caught) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_kernel_is_built_where_a_compiler_is() -> None:
    assert kernel.available(), "run `python setup.py build_ext --inplace`"


def test_a_broken_compiler_does_not_break_the_build(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", f"--build-lib={tmp_path / 'lib'}"]
    environment = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    source = tmp_path / "source"
    (source / "src" / "pocketrec").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "src/pocketrec/_kernel.cpp"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    (source / "src" / "pocketrec" / "__init__.py").touch()
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    assert not list(tmp_path.rglob("*.so"))
