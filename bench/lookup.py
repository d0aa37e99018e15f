"""Packed look-up against compressed sparse rows with int64 indices, at Criteo's shape.

Run from the repository's root: ``OMP_NUM_THREADS=1 python bench/lookup.py`` with the extra ``compare`` (numba).
One thread, one process; every reader has arrays of its own. In each round every reader has a turn, the first one
rotating: some batches untimed, then fresh batches of Zipf(1.1) ids, each timed by the thread's processor time and by
the wall. Readers are checked to give the same vectors. The base of the ratios is ``csr numba``, as published code does
it (a scalar loop over rows that writes kept entries into an output filled with the codebook); without numba it is
``csr c++``, the same loop compiled with ``-O3``, and the results say so. Writes ``bench/results/lookup.md``.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from criteo_shape import FIELDS, ROWS, WIDTH, CriteoShape
from numpy.typing import NDArray

from pocketrec.format.block import PackedRange, Storage
from pocketrec.format.entries import Index
from pocketrec.format.packed import Packed
from pocketrec.native import library

RESULTS = Path(__file__).parent / "results"
TURNS = {1: (10, 20), 64: (10, 15), 2048: (1, 2)}
"""Untimed and timed batches in a turn, by batch size."""

POOL = {1: 600, 64: 400, 2048: 40}
"""Batches drawn beforehand, by batch size; a turn takes its own at random."""

CSR_SOURCE = """
#include <cstdint>
extern "C" void csr(const float *values, const int64_t *indptr, const int64_t *indices, const int64_t *rows,
                    int64_t count, int64_t width, float *out) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t e = indptr[rows[i]]; e < indptr[rows[i] + 1]; ++e) out[i * width + indices[e]] = values[e];
}
"""
LEVELS: tuple[library.Level, ...] = ("portable", "avx2", "avx512")
STORAGES: tuple[Storage, ...] = ("fp32", "fp16", "int8")
INDEXES: tuple[Index, ...] = ("compact", "direct")
TOLERANCE = {"fp32": 0.0, "fp16": 0.004, "int8": 0.05}
Reader = Callable[[NDArray[np.int64], NDArray[np.float32]], Any]


class Csr:
    """The kept entries as values, int64 row pointers and int64 column indices; 2.9 bytes per parameter at 80 %."""

    def __init__(self, weight: NDArray[np.float32], keep: NDArray[np.bool_], fill: NDArray[np.float32]) -> None:
        self.indptr = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int64)
        self.indices = np.nonzero(keep)[1].astype(np.int64)
        self.values = weight[keep]
        self.fill = fill

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


def packed_reader(
    weight: NDArray[np.float32],
    keep: NDArray[np.bool_],
    fill: NDArray[np.float32],
    fields: NDArray[np.int32],
    index: Index,
    storage: Storage,
    most: library.Level | None,
) -> Reader:
    """Ours with arrays of its own: the compiled kernel at one instruction set, or numpy."""
    block = PackedRange("embedding", 0, ROWS, 0, WIDTH)
    packed = Packed.encode(weight, keep, fill, fill, (block,), fields, storage=storage, index=index)
    columns = np.arange(FIELDS, dtype=np.int32)
    if most is None:
        return lambda rows, out: np.copyto(out, packed.lookup_numpy(rows, columns))
    return lambda rows, out: packed.lookup(rows, columns, out=out)


def all_readers(shape: CriteoShape, keep: NDArray[np.bool_], folder: Path) -> dict[str, tuple[Reader, library.Level]]:
    """Every reader, and the instruction set to limit our kernel to; the base of the ratios first."""
    weight = np.ascontiguousarray(shape.weight[:, :WIDTH])
    fill = np.random.default_rng(1).normal(size=(FIELDS, WIDTH)).astype(np.float32)
    top = LEVELS[-1]
    readers: dict[str, tuple[Reader, library.Level]] = {}
    if find_spec("numba"):
        readers["csr numba"] = Csr(weight, keep, fill).numba(), top
    readers["csr c++"] = Csr(weight, keep, fill).compiled(folder), top
    readers["dense numpy"] = partial(dense_numpy, weight.copy()), top
    readers["dense torch"] = partial(dense_torch, torch.nn.Embedding.from_pretrained(torch.tensor(weight))), top
    pack = partial(packed_reader, weight, keep, fill, shape.fields)
    for index in INDEXES:
        for storage in STORAGES:
            readers[f"{index} {storage}, {top}"] = pack(index, storage, top), top
        for most in LEVELS[:-1]:
            readers[f"{index} fp32, {most}"] = pack(index, "fp32", most), most
        readers[f"{index} fp32, numpy"] = pack(index, "fp32", None), top
    return readers


def dense_numpy(weight: NDArray[np.float32], rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """The uncompressed table, gathered by numpy."""
    np.take(weight, rows, axis=0, out=out, mode="clip")


@torch.inference_mode()
def dense_torch(embedding: torch.nn.Embedding, rows: NDArray[np.int64], _: NDArray[np.float32]) -> torch.Tensor:
    """The uncompressed table, read by torch."""
    return embedding(torch.from_numpy(rows))


def time_all(
    readers: dict[str, tuple[Reader, library.Level]], shape: CriteoShape, size: int, rounds: int
) -> dict[str, NDArray[np.float64]]:
    """Microseconds of one call, ``(rounds * timed, 2)`` per reader: processor time and wall time."""
    pool = [shape.batch(size, step) for step in range(POOL[size])]
    generator = np.random.default_rng(size)
    out = np.empty((size, FIELDS, WIDTH), np.float32)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    untimed, timed = TURNS[size]
    for step in range(rounds):
        order = list(readers)[step % len(readers) :] + list(readers)[: step % len(readers)]
        for name in order:
            read, most = readers[name]
            library.limit(most)
            calls = []
            for i in generator.choice(len(pool), untimed + timed, replace=False):
                wall, processor = time.perf_counter(), time.thread_time()
                read(pool[i], out)
                calls.append(((time.thread_time() - processor) * 1e6, (time.perf_counter() - wall) * 1e6))
            times[name] += calls[untimed:]
    return {name: np.array(t) for name, t in times.items()}


def check(readers: dict[str, tuple[Reader, library.Level]], shape: CriteoShape) -> None:
    """Every reader of the pruned table gives the same vectors, up to its storage."""
    rows = shape.batch(512, 10_000)
    base, found = (np.empty((512, FIELDS, WIDTH), np.float32) for _ in range(2))
    readers["csr c++"][0](rows, base)
    for name, (read, most) in readers.items():
        if name.startswith("dense"):
            continue
        library.limit(most)
        read(rows, found)
        tolerance = next((t for storage, t in TOLERANCE.items() if storage in name), 0.0)
        if np.abs(found - base).max() > tolerance:
            sys.exit(f"{name} gives other vectors than csr c++")


def measure(shape: CriteoShape, sparsity: float, rounds: int) -> list[dict[str, Any]]:
    """One record for each reader and batch size."""
    results = []
    keep = shape.keep(sparsity)
    with tempfile.TemporaryDirectory() as folder:
        readers = all_readers(shape, keep, Path(folder))
        check(readers, shape)
        base = next(iter(readers))
        for size in TURNS:
            times = time_all(readers, shape, size, rounds)
            for name, t in times.items():
                low, median, high = np.percentile(t[:, 0], [10, 50, 90])
                ratios = np.median(times[base], axis=0) / np.median(t, axis=0)
                results.append({
                    "sparsity": sparsity, "rows_with_values": round(float(keep.any(axis=1).mean()), 4), "base": base,
                    "batch": size, "reader": name, "median_us": round(median, 1), "p10_us": round(low, 1),
                    "p90_us": round(high, 1), "wall_median_us": round(float(np.median(t[:, 1])), 1),
                    "ratio": round(ratios[0], 2), "ratio_wall": round(ratios[1], 2),
                })  # fmt: skip
    return results


def report(results: list[dict[str, Any]]) -> str:
    """The tables for people."""
    base = results[0]["base"]
    missing = "" if base == "csr numba" else " **numba is not installed: the base is the loop in C++.**"
    lines = ["# Packed look-up, microseconds per call", "",
             f"{FIELDS} fields, {ROWS:,} rows, {WIDTH} columns, one thread, fresh batches, readers in rotation. Times "
             f"are processor time of the thread; the ratios' base is `{base}`; `compact` and `direct` are our two "
             f"indexes.{missing}"]  # fmt: skip
    for sparsity in dict.fromkeys(r["sparsity"] for r in results):
        part = [r for r in results if r["sparsity"] == sparsity]
        stored = part[0]["rows_with_values"]
        lines += ["", f"## {sparsity:.0%} of values removed, {stored:.0%} of rows keep something", "",
                  "| reader | batch | median | 10-90 % | wall median | ratio | ratio of wall |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {r['reader']} | {r['batch']} | {r['median_us']} | {r['p10_us']}-{r['p90_us']} | {r['wall_median_us']} "
            f"| {r['ratio']:.2f} | {r['ratio_wall']:.2f} |"
            for r in part
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.95])
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = CriteoShape()
    results = [r for s in arguments.sparsity for r in measure(shape, s, arguments.rounds)]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "lookup.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
