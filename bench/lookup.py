"""Packed look-up against compressed sparse rows with int64 indices, at Criteo's shape.

Run from the repository's root: ``OMP_NUM_THREADS=1 python bench/lookup.py``. One thread, all variants in turn in one
process, every round on the same fresh batches; processor time, so that other processes count less; readers are checked
to give the same vectors. The base of the ratios is ``csr numba`` where numba is installed, as published code does it (a
scalar loop over rows that writes kept entries into an output filled with the codebook), else ``csr c++``, the same loop
compiled with ``-O3``. Writes ``bench/results/lookup.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from criteo_shape import FIELDS, ROWS, WIDTH, CriteoShape
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from pocketrec import kernel
from pocketrec.packed import Packed, PackedRange

RESULTS = Path(__file__).parent / "results"
BATCHES = {1: 200, 64: 60, 2048: 9}
CSR_SOURCE = """
#include <cstdint>
extern "C" void csr(const float *values, const int64_t *indptr, const int64_t *indices, const int64_t *rows,
                    int64_t count, int64_t width, float *out) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t e = indptr[rows[i]]; e < indptr[rows[i] + 1]; ++e) out[i * width + indices[e]] = values[e];
}
"""
LEVELS: tuple[kernel.Level, ...] = ("portable", "avx2", "avx512")
Reader = Callable[[NDArray[np.int64], NDArray[np.float32]], Any]


class Csr:
    """The kept entries as values, int64 row pointers and int64 column indices; 2.9 bytes per parameter at 80 %."""

    def __init__(self, weight: NDArray[np.float32], keep: NDArray[np.bool_], fill: NDArray[np.float32]) -> None:
        self.indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int64)
        self.indices = np.nonzero(keep)[1].astype(np.int64)
        self.values = weight[keep]
        self.fill = fill
        self.matrix = csr_matrix((self.values, self.indices, self.indptr), shape=keep.shape)

    def numba(self) -> Reader:
        """The published loop."""

        def loop(
            values: NDArray[np.float32],
            indptr: NDArray[np.int64],
            indices: NDArray[np.int64],
            rows: NDArray[np.int64],
            out: NDArray[np.float32],
        ) -> None:
            for i in range(rows.shape[0]):
                for e in range(indptr[rows[i]], indptr[rows[i] + 1]):
                    out[i, indices[e]] = values[e]

        compiled = importlib.import_module("numba").njit(loop)

        def read(rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
            out[...] = self.fill
            compiled(self.values, self.indptr, self.indices, rows.reshape(-1), out.reshape(-1, WIDTH))

        return read

    def compiled(self, folder: Path) -> Reader:
        """The same loop in C++."""
        source, library = folder / "csr.cpp", folder / "csr.so"
        source.write_text(CSR_SOURCE)
        subprocess.run(["g++", "-O3", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).csr
        function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_void_p]

        def read(rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
            out[...] = self.fill
            function(
                self.values.ctypes.data, self.indptr.ctypes.data, self.indices.ctypes.data, rows.ctypes.data,
                rows.size, WIDTH, out.ctypes.data,
            )  # fmt: skip

        return read

    def scipy(self) -> Reader:
        """Row indexing by scipy, kept entries over the codebook."""

        def read(rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
            found = self.matrix[rows.reshape(-1)]
            out[...] = self.fill
            out.reshape(-1, WIDTH)[np.repeat(np.arange(rows.size), np.diff(found.indptr)), found.indices] = found.data

        return read


def packed_readers(shape: CriteoShape, keep: NDArray[np.bool_], fill: NDArray[np.float32]) -> dict[str, Reader]:
    """Ours: the compiled kernel at every instruction set and storage, and numpy."""
    fields = np.arange(FIELDS, dtype=np.int32)
    block = (PackedRange("embedding", 0, ROWS, 0, WIDTH),)
    readers: dict[str, Reader] = {}

    def at_level(packed: Packed, most: kernel.Level) -> Reader:
        def read(rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
            kernel.limit(most)
            packed.lookup(rows, fields, out=out)

        return read

    for storage in ("fp32", "fp16", "int8"):
        packed = Packed.encode(shape.weight[:, :WIDTH], keep, fill, fill, block, shape.fields, storage=storage)
        for most in LEVELS if storage == "fp32" else LEVELS[-1:]:
            readers[f"packed {storage}, {most}"] = at_level(packed, most)
        if storage == "fp32":
            readers["packed fp32, numpy"] = lambda rows, out, p=packed: np.copyto(out, p.lookup_numpy(rows, fields))
    return readers


def dense_reader(weight: NDArray[np.float32]) -> Reader:
    """The uncompressed table, gathered by numpy."""
    return lambda rows, out: np.take(weight, rows, axis=0, out=out, mode="clip")


def time_all(readers: dict[str, Reader], shape: CriteoShape, size: int, rounds: int) -> dict[str, NDArray[np.float64]]:
    """Microseconds of one call, ``(rounds,)`` per reader: the median of five batches in each round, readers in turn."""
    out = np.empty((size, FIELDS, WIDTH), np.float32)
    times: dict[str, list[float]] = {name: [] for name in readers}
    for step in range(rounds):
        rows = [shape.batch(size, 5 * step + i) for i in range(5)]
        for name, read in readers.items():
            calls = []
            for batch in rows:
                begin = time.thread_time()
                read(batch, out)
                calls.append(time.thread_time() - begin)
            times[name].append(float(np.median(calls)) * 1e6)
    return {name: np.array(t) for name, t in times.items()}


def check(readers: dict[str, Reader], shape: CriteoShape) -> None:
    """Every fp32 reader gives the same vectors."""
    rows = shape.batch(512, 10_000)
    results = {}
    for name, read in readers.items():
        results[name] = np.empty((512, FIELDS, WIDTH), np.float32)
        read(rows, results[name])
    base = results["csr c++"]
    for name, found in results.items():
        tolerance = 0.05 if "int8" in name else 0.002 if "fp16" in name else 0.0
        if name != "dense numpy" and np.abs(found - base).max() > tolerance:
            sys.exit(f"{name} gives other vectors than csr c++")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.95])
    parser.add_argument("--rounds", type=int, default=1, help="multiplies the number of rounds")
    arguments = parser.parse_args()
    shape = CriteoShape()
    fill = np.random.default_rng(1).normal(size=(FIELDS, WIDTH)).astype(np.float32)
    lines = ["# Packed look-up, microseconds per call", ""]
    results: list[dict[str, Any]] = []
    for sparsity in arguments.sparsity:
        keep = shape.keep(sparsity)
        csr = Csr(shape.weight[:, :WIDTH], keep, fill)
        with tempfile.TemporaryDirectory() as folder:
            readers = {"csr numba": csr.numba()} if find_spec("numba") else {}
            readers |= {"csr c++": csr.compiled(Path(folder)), "csr scipy": csr.scipy()}
            readers |= {"dense numpy": dense_reader(shape.weight[:, :WIDTH].copy())}
            readers |= packed_readers(shape, keep, fill)
            check(readers, shape)
            base = next(iter(readers))
            lines += [
                f"## {sparsity:.0%} of values removed, {keep.any(axis=1).mean():.0%} of rows keep something", "",
                f"{FIELDS} fields, {ROWS:,} rows, {WIDTH} columns, one thread; the ratio's base is `{base}`.", "",
                "| reader | batch | min | median | 10-90 % | ratio of medians | of minima |",
                "|---|---|---|---|---|---|---|",
            ]  # fmt: skip
            for size, rounds in BATCHES.items():
                times = time_all(readers, shape, size, rounds * arguments.rounds)
                for name, t in times.items():
                    low, high = np.percentile(t, [10, 90])
                    ratio, ratio_min = np.median(times[base]) / np.median(t), times[base].min() / t.min()
                    lines.append(
                        f"| {name} | {size} | {t.min():.1f} | {np.median(t):.1f} | {low:.1f}-{high:.1f} "
                        f"| {ratio:.2f} | {ratio_min:.2f} |"
                    )
                    results.append({
                        "sparsity": sparsity, "reader": name, "batch": size, "base": base, "min_us": t.min(),
                        "median_us": float(np.median(t)), "ratio_median": float(ratio), "ratio_min": float(ratio_min),
                    })  # fmt: skip
            lines.append("")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "lookup.md").write_text("\n".join(lines))
    (RESULTS / "lookup.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
