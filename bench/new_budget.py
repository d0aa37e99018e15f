"""Time of one more budget: from a stored scoring run to a written file, for a table of 17.4 million parameters.

    python bench/new_budget.py

Criteo's shape (39 fields, 1,086,810 rows of 16 + 1) and hashed string keys; the stored scores follow the frequencies.
Each trial is a whole ``compress`` with the run's folder and ``save``: digest of the model, stored scores, ranking,
selection, vocabulary, packing, writing. One thread; one budget per fresh process, so that the peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from criteo_shape import FIELDS, ROWS, WIDTH, CriteoShape
from numpy.typing import NDArray

from pocketrec.attribution.scores import Scores
from pocketrec.backbones.deepfm import DeepFM
from pocketrec.compression.compress import compress
from pocketrec.methods.shaver import Shaver
from pocketrec.models.backbone import Model
from pocketrec.schema import Field, Schema
from pocketrec.training.run import Run
from pocketrec.training.steps import Checkpoint

RESULTS = Path(__file__).parent / "results"
BUDGETS = ("sparsity=0.5", "sparsity=0.8", "sparsity=0.95", "20%", "5%", "16MiB", "6MiB")


class Shape:
    """What ``compress`` reads of a data set once the scores are stored."""

    digest = "criteo shape"

    def __init__(self, folder: Path) -> None:
        shape = CriteoShape()
        self.folder = folder
        sizes, offsets = shape.sizes.tolist(), shape.offsets.tolist()
        fields = (Field(f"c{i}", n, o) for i, (n, o) in enumerate(zip(sizes, offsets, strict=True)))
        self.schema = Schema("ctr", tuple(fields))

    @property
    def counts(self) -> NDArray[np.int64]:
        """Zipf counts, memory-mapped as in a data set."""
        return np.load(self.folder / "counts.npy", mmap_mode="r")

    def hashes(self, field: int) -> NDArray[np.uint64]:
        """Random fingerprints, memory-mapped."""
        schema = self.schema.fields[field]
        return np.load(self.folder / "hashes.npy", mmap_mode="r")[schema.offset : schema.stop - 1]

    def write(self) -> None:
        """Lay the arrays down."""
        shape, rng = CriteoShape(), np.random.default_rng(0)
        counts = np.empty(ROWS, np.int64)
        for rows in shape.order:
            counts[rows] = np.ceil(1e6 * np.arange(1, len(rows) + 1) ** -1.1)
        np.save(self.folder / "counts.npy", counts)
        np.save(self.folder / "hashes.npy", rng.integers(0, 2**64, ROWS, dtype=np.uint64))
        square = (rng.lognormal(0, 1.47, (ROWS, WIDTH + 1)) * counts[:, None]).astype(np.float32)
        np.savez(self.folder / "scores.npz", mean=np.sqrt(square), square=square)

    @property
    def train(self) -> Any:
        """Training rows are not read."""
        raise AssertionError


@dataclass(frozen=True)
class Stored(Shaver):
    """Shaver whose scoring run is read from a file, once."""

    folder: str = ""

    def _attribute(self, model: Model, data: Any, run: Run, checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
        with np.load(Path(self.folder) / "scores.npz") as arrays:
            return Scores(arrays["mean"], arrays["square"], 36_000_000, 1.0, 1.0).arrays()


def trial(folder: Path, budget: str) -> dict[str, float]:
    """One new budget."""
    torch.set_num_threads(1)
    data, method = Shape(folder), Stored(folder=str(folder))
    model = DeepFM(dim=WIDTH).build(data, 0)  # pyright: ignore[reportArgumentType]
    before = psutil.Process().memory_info().rss
    started, cpu = time.perf_counter(), time.process_time()
    small = compress(model, data, method, budget, run=folder / "run")  # pyright: ignore[reportCallIssue, reportArgumentType]
    selected = time.perf_counter()
    sizes = small.save(folder / "small.safetensors")
    done, cpu = time.perf_counter(), time.process_time() - cpu
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return {
        "seconds": done - started, "cpu_seconds": cpu,
        "select_seconds": selected - started, "pack_write_seconds": done - selected,
        "file_bytes": sizes["file"], "values": small.values, "before_bytes": before, "peak_bytes": peak,
    }  # fmt: skip


def main() -> None:
    """Measure and write bench/results/new_budget.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trial", nargs=2, metavar=("FOLDER", "BUDGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trial:
        print(json.dumps(trial(Path(args.trial[0]), args.trial[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        Shape(Path(name)).write()
        results: dict[str, list[dict[str, float]]] = {b: [] for b in BUDGETS}
        for i in range(args.rounds + 1):
            for budget in BUDGETS[:1] if i == 0 else BUDGETS:
                command = [sys.executable, __file__, "--trial", name, budget]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                if i:
                    results[budget].append(json.loads(done.stdout))
    write(results)


def write(results: dict[str, list[dict[str, float]]]) -> None:
    """Least and median seconds per budget."""
    rows = [
        {
            "budget": budget,
            "seconds_min": round(min(t["seconds"] for t in trials), 3),
            "seconds_median": round(statistics.median(t["seconds"] for t in trials), 3),
            "cpu_seconds_min": round(min(t["cpu_seconds"] for t in trials), 3),
            "select_seconds_min": round(min(t["select_seconds"] for t in trials), 3),
            "pack_write_seconds_min": round(min(t["pack_write_seconds"] for t in trials), 3),
            "file_bytes": int(trials[0]["file_bytes"]),
            "values": int(trials[0]["values"]),
            "before_mib": round(max(t["before_bytes"] for t in trials) / 2**20),
            "peak_mib": round(max(t["peak_bytes"] for t in trials) / 2**20),
        }
        for budget, trials in results.items()
    ]
    lines = [
        "# A new budget from a stored scoring run",
        "",
        f"`python bench/new_budget.py`: {FIELDS} fields, {ROWS:,} rows of {WIDTH} + 1 (17.4 million parameters and",
        "the linear weights), hashed keys, MLP 400x3; from the run's folder to the written file, one thread, a fresh",
        "process each.",
        "",
        f"Load average while it ran: {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} processors (elapsed",
        "times of a shared machine are upper bounds; processor time is the cost itself).",
        "",
        "| budget | s min | s median | CPU s min | select | pack | file bytes | values | MiB before | MiB peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['budget']} | {r['seconds_min']} | {r['seconds_median']} | {r['cpu_seconds_min']} "
            f"| {r['select_seconds_min']} | {r['pack_write_seconds_min']} | {r['file_bytes']:,} | {r['values']:,} "
            f"| {r['before_mib']} | {r['peak_mib']} |"
            for r in rows
        ),
        "",
    ]
    (RESULTS / "new_budget.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
