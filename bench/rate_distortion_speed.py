"""Time of rate-distortion coding at Criteo's shape: the scoring pass, a new budget with its file, and look-ups.

    python bench/rate_distortion_speed.py

39 fields, 1,086,810 rows of 16 + 1, hashed string keys, MLP 400x3, Zipf(1.1) ids, random weights whose columns fall in
size as those of a trained table do. One thread. Scoring reads a million samples once per round; a new budget is a whole
``compress`` with the run's folder and ``save``, in a fresh process each. Look-ups of fresh batches of 64 take turns in
one process: ``nn.Embedding`` over the dense table, the compiled kernel at each instruction set, and numpy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from criteo_shape import FIELDS, ROWS, WIDTH, CriteoShape
from numpy.typing import NDArray

from pocketrec.attribution.fisher import Sensitivity, sensitivity
from pocketrec.backbones.deepfm import DeepFM
from pocketrec.compression.compress import compress
from pocketrec.data.dataset import Split
from pocketrec.format.packed import Packed
from pocketrec.methods.rate_distortion import RateDistortion
from pocketrec.models.backbone import Model
from pocketrec.models.table import DenseTable
from pocketrec.native import library
from pocketrec.schema import Field, Schema
from pocketrec.training.run import Run

RESULTS = Path(__file__).parent / "results"
BUDGETS = ("10%", "5%", "2%", "1%", "8MiB")
SHARES = ("10%", "5%", "2%")
BATCH, TURNS, POOL = 64, (5, 20), 600
"""Rows of a look-up, untimed and timed ones in a turn, and batches drawn beforehand."""


class Shape:
    """What ``compress`` reads of a data set."""

    digest = "criteo shape"

    def __init__(self, folder: Path) -> None:
        shape = CriteoShape()
        self.folder = folder
        sizes, offsets = shape.sizes.tolist(), shape.offsets.tolist()
        fields = (Field(f"c{i}", n, o) for i, (n, o) in enumerate(zip(sizes, offsets, strict=True)))
        self.schema = Schema("ctr", tuple(fields))

    def hashes(self, field: int) -> NDArray[np.uint64]:
        """Random fingerprints, memory-mapped."""
        schema = self.schema.fields[field]
        return np.load(self.folder / "hashes.npy", mmap_mode="r")[schema.offset : schema.stop - 1]

    @property
    def train(self) -> Split:
        """Zipf ids and random labels, memory-mapped."""
        ids = np.load(self.folder / "ids.npy", mmap_mode="r")
        labels = np.load(self.folder / "labels.npy")
        return Split("train", self, ids, labels, np.arange(len(ids)), None)  # pyright: ignore[reportArgumentType]

    def model(self) -> Model:
        """A DeepFM whose table has columns of falling size, turned."""
        rng = np.random.default_rng(1)
        turn, _ = np.linalg.qr(rng.normal(size=(WIDTH + 1, WIDTH + 1)))
        columns = 0.1 * 0.8 ** np.arange(WIDTH + 1)
        weight = (rng.normal(size=(ROWS, WIDTH + 1)) * columns) @ turn
        model = DeepFM(dim=WIDTH).build(self, 0)  # pyright: ignore[reportArgumentType]
        table = DenseTable(self.schema, model.table.blocks, torch.from_numpy(weight.astype(np.float32)))
        return model.with_table(table)

    def write(self, samples: int) -> None:
        """Lay the arrays down."""
        rng = np.random.default_rng(0)
        np.save(self.folder / "hashes.npy", rng.integers(0, 2**64, ROWS, dtype=np.uint64))
        np.save(self.folder / "ids.npy", CriteoShape().batch(samples, 0).astype(np.int32))
        np.save(self.folder / "labels.npy", (rng.random(samples) < 0.25).astype(np.float32))


def spent(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What the work returns, and its seconds by the wall and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - wall, time.process_time() - cpu


def score(folder: Path) -> dict[str, float]:
    """One pass over all samples."""
    data: Any = Shape(folder)
    model = data.model()
    found, wall, cpu = spent(lambda: sensitivity(model, data, samples=None, probes=1, seed=0))
    np.savez(folder / "sensitivity.npz", **found.arrays())
    return {"wall": wall, "cpu": cpu, "peak": peak()}


def stored(folder: Path) -> None:
    """Keep the finished scoring run as a run keeps it, so that no budget scores again."""
    data: Any = Shape(folder)
    method = RateDistortion()
    with np.load(folder / "sensitivity.npz") as arrays, Run(folder / "run") as run:
        found = Sensitivity.from_arrays(dict(arrays))
        run.once("fisher", method.key(data.model(), data), lambda checkpoint: found.arrays())


def budget(folder: Path, name: str) -> dict[str, float]:
    """One new budget."""
    data: Any = Shape(folder)
    model = data.model()

    def work() -> dict[str, int]:
        small = compress(model, data, RateDistortion(), name, run=folder / "run")
        return small.save(folder / "small.safetensors")

    sizes, wall, cpu = spent(work)
    return {"wall": wall, "cpu": cpu, "peak": peak(), "file": sizes["file"], "table": sizes["table"]}


def peak() -> int:
    """High-water mark of the process, in bytes."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def lookups(folder: Path, rounds: int) -> dict[str, NDArray[np.float64]]:
    """Microseconds of one look-up, ``(rounds * timed, 2)`` by reader: processor time and wall time."""
    data: Any = Shape(folder)
    shape = CriteoShape()
    model = data.model()
    embedding = torch.nn.Embedding.from_pretrained(model.table.weight().detach().clone())
    out = np.empty((BATCH, FIELDS, WIDTH + 1), np.float32)
    readers: dict[str, tuple[Callable[[NDArray[np.int64]], Any], library.Level]] = {
        "nn.Embedding, dense": (lambda rows: embedding(torch.from_numpy(rows)), library.LEVELS[-1])
    }
    for share in SHARES:
        small = compress(model, data, RateDistortion(), share, run=folder / "run")
        packed = small.table.pack()
        for level in ("portable", "avx512"):
            readers[f"{share}, kernel, {level}"] = (lambda rows, p=packed: kernel_lookup(p, rows, out)), level
        readers[f"{share}, numpy"] = (lambda rows, p=packed: p.lookup_numpy(rows, COLUMNS)), library.LEVELS[-1]
    pool = [shape.batch(BATCH, step) for step in range(POOL)]
    generator = np.random.default_rng(0)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    with torch.inference_mode():
        for turn in range(rounds):
            names = list(readers)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                read, level = readers[name]
                library.limit(level)
                for i, which in enumerate(generator.choice(POOL, sum(TURNS), replace=False)):
                    _, wall, cpu = spent(lambda read=read, rows=pool[which]: read(rows))
                    if i >= TURNS[0]:
                        times[name].append((cpu * 1e6, wall * 1e6))
    return {name: np.array(t) for name, t in times.items()}


COLUMNS = np.arange(FIELDS, dtype=np.int32)


def kernel_lookup(packed: Packed, rows: NDArray[np.int64], out: NDArray[np.float32]) -> None:
    """By the compiled kernel."""
    packed.lookup(rows, COLUMNS, out=out)


def fresh(folder: Path, *what: str) -> dict[str, float]:
    """A trial in a process of its own."""
    command = [sys.executable, __file__, "--trial", str(folder), *what]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def figures(trials: list[dict[str, float]]) -> dict[str, float]:
    """Median and spread of processor time, median of elapsed time, largest memory."""
    cpu = np.array([t["cpu"] for t in trials])
    return {
        "cpu_median": round(float(np.median(cpu)), 2), "cpu_least": round(float(cpu.min()), 2),
        "cpu_most": round(float(cpu.max()), 2), "wall_median": round(float(np.median([t["wall"] for t in trials])), 2),
        "peak_mib": round(max(t["peak"] for t in trials) / 2**20),
    }  # fmt: skip


def report(passes: list[dict[str, Any]], reads: list[dict[str, Any]]) -> str:
    """The tables for people."""
    lines = [
        "# Rate-distortion coding: time at Criteo's shape",
        "",
        f"`python bench/rate_distortion_speed.py`: {FIELDS} fields, {ROWS:,} rows of {WIDTH} + 1, hashed keys, MLP",
        "400x3, Zipf(1.1) ids, one thread. Processor time is the cost itself, elapsed times of a shared machine are",
        f"upper bounds: load average at the end {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} processors.",
        "",
        "| what | CPU s, median | least - most | elapsed s, median | MiB peak | file bytes | table bytes |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r['what']} | {r['cpu_median']} | {r['cpu_least']} - {r['cpu_most']} | {r['wall_median']} "
            f"| {r['peak_mib']} | {r.get('file', '')} | {r.get('table', '')} |"
            for r in passes
        ),
        "",
        f"Look-up of {BATCH} samples x {FIELDS} fields, microseconds; readers in rotation, fresh batches. The ratio is",
        "of median processor times.",
        "",
        "| reader | CPU median | 10-90 % | wall median | times nn.Embedding |",
        "|---|---|---|---|---|",
        *(f"| {r['reader']} | {r['cpu']} | {r['low']}-{r['high']} | {r['wall']} | {r['ratio']} |" for r in reads),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write bench/results/rate_distortion_speed.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000, help="of the scoring pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=24, help="rounds of look-ups")
    parser.add_argument("--trial", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.trial:
        folder, *what = args.trial
        print(json.dumps(budget(Path(folder), what[0]) if what else score(Path(folder))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Shape(folder).write(args.samples)
        scoring = [fresh(folder) for _ in range(args.rounds)]
        passes = [{"what": f"scoring {args.samples:,} samples", **figures(scoring)}]
        stored(folder)
        for text in BUDGETS:
            trials = [fresh(folder, text) for _ in range(args.rounds)]
            sizes = {n: f"{int(trials[0][n]):,}" for n in ("file", "table")}
            passes.append({"what": f"budget {text}", **figures(trials), **sizes})
        times = lookups(folder, args.turns)
    base = float(np.median(next(iter(times.values()))[:, 0]))
    reads = []
    for reader, t in times.items():
        low, median, high = np.percentile(t[:, 0], [10, 50, 90])
        reads.append({"reader": reader, "cpu": round(median, 1), "low": round(low, 1), "high": round(high, 1),
                      "wall": round(float(np.median(t[:, 1])), 1), "ratio": round(median / base, 2)})  # fmt: skip
    text = report(passes, reads)
    (RESULTS / "rate_distortion_speed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
