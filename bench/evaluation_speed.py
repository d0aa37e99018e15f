"""Full evaluation of Gowalla: every user, every item, NDCG@20 and Recall@20, d = 64.

``ours`` is ``pocketrec.evaluation.metrics.ranking``; ``reference`` is one matrix product, a scatter of ``-inf`` and
``topk`` per block of 2,048 users in torch, with the same vectorised metrics behind it. Both run in one process, in
turn, and must find the same figures. Vectors are those of a trained run (``--run``), or drawn: normal, item lengths
growing with popularity.

    python bench/evaluation_speed.py [--run DIR] [--rounds 7]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch
from configs import RESULTS, raw
from numpy.typing import NDArray

from pocketrec.evaluation.metrics import Csr, ranking, to_csr
from pocketrec.native import library

USERS, ITEMS, WIDTH, K, BLOCK = 29_858, 40_981, 64, 20, 2048
Vectors = tuple[NDArray[np.float32], NDArray[np.float32]]
Figures = tuple[float, float]


def interactions(name: str) -> Csr:
    """Items per user of one file of the data set."""
    pairs = pl.read_parquet(raw("gowalla", f"{name}.parquet"))
    return to_csr(pairs["user"].to_numpy(), pairs["item"].to_numpy(), USERS)


def drawn(seen: Csr) -> Vectors:
    """Normal vectors; an item's length grows with the 0.3rd power of its popularity."""
    rng = np.random.default_rng(0)
    popularity = np.bincount(seen[1], minlength=ITEMS) + 1.0
    users, items = rng.normal(0, 0.1, (USERS, WIDTH)), rng.normal(0, 0.1, (ITEMS, WIDTH)) * popularity[:, None] ** 0.3
    return users.astype(np.float32), items.astype(np.float32)


def trained(run: Path) -> Vectors:
    """Final vectors of a trained run."""
    from pocketrec.training.train import load

    model, _ = load(run)
    with torch.inference_mode():
        vectors = model.propagate(model.table.weight()).numpy()  # type: ignore[operator]
    return vectors[:USERS], vectors[USERS:]


def ours(vectors: Vectors, seen: Csr, truth: Csr, threads: int) -> Figures:
    """NDCG and recall by the library."""
    quality = ranking(*vectors, seen, truth, K, threads=threads).quality()
    return float(quality[f"ndcg@{K}"] or 0), float(quality[f"recall@{K}"] or 0)


def reference(vectors: Vectors, seen: Csr, truth: Csr, threads: int) -> Figures:
    """NDCG and recall by matrix product and top-k of large blocks."""
    torch.set_num_threads(threads)
    users, items = torch.from_numpy(vectors[0]), torch.from_numpy(vectors[1])
    owner = torch.from_numpy(np.repeat(np.arange(USERS), np.diff(seen[0])))
    columns = torch.from_numpy(seen[1].astype(np.int64))
    lists = torch.empty(USERS, K, dtype=torch.int64)
    for start in range(0, USERS, BLOCK):
        stop = min(start + BLOCK, USERS)
        scores = users[start:stop] @ items.T
        span = slice(int(seen[0][start]), int(seen[0][stop]))
        scores[owner[span] - start, columns[span]] = -torch.inf
        lists[start:stop] = scores.topk(K).indices
    return figures(lists.numpy(), truth)


def figures(lists: NDArray[np.int64], truth: Csr) -> Figures:
    """Mean NDCG and recall of ranked lists ``(U, K)``."""
    sizes = np.diff(truth[0])
    wanted = np.repeat(np.arange(USERS), sizes) * ITEMS + truth[1]
    keys = np.arange(USERS)[:, None] * ITEMS + lists
    hits = wanted[np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)] == keys
    discount = 1 / np.log2(np.arange(2, K + 2))
    kept = sizes > 0
    ideal = np.cumsum(discount)[np.minimum(sizes[kept], K) - 1]
    return float(((hits[kept] * discount).sum(1) / ideal).mean()), float((hits[kept].sum(1) / sizes[kept]).mean())


SIDES: dict[str, Callable[[Vectors, Csr, Csr, int], Figures]] = {"reference": reference, "ours": ours}


def memory(name: str) -> int:
    """KiB of this process: ``VmRSS`` now, ``VmHWM`` at most since the mark was last cleared."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def peak(side: str, run: Path | None) -> int:
    """MiB by which one evaluation raises the peak memory of a fresh process."""
    command = [sys.executable, __file__, "--peak", side, *(["--run", str(run)] if run else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Time both sides in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", choices=SIDES)
    options = parser.parse_args()
    seen, truth = interactions("train"), interactions("test")
    vectors = trained(options.run) if options.run else drawn(seen)
    if options.peak:
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        SIDES[options.peak](vectors, seen, truth, 1)
        print((memory("VmHWM") - before) // 1024)
        return
    rows = [row for threads in (1, 2) for row in compare(vectors, seen, truth, threads, options.rounds)]
    peaks = {side: peak(side, options.run) for side in SIDES}
    write(rows, peaks, "a trained run" if options.run else "drawn")


def compare(vectors: Vectors, seen: Csr, truth: Csr, threads: int, rounds: int) -> list[dict[str, object]]:
    """Seconds of both sides, taken in turn after one warm-up each."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    found = {side: run(vectors, seen, truth, threads) for side, run in SIDES.items()}
    if not np.allclose(found["ours"], found["reference"], atol=1e-5):
        raise SystemExit(f"The two sides disagree: {found}.")
    for _ in range(rounds):
        for side, run in SIDES.items():
            start = time.perf_counter()
            run(vectors, seen, truth, threads)
            seconds[side].append(time.perf_counter() - start)
    ratios = np.array(seconds["reference"]) / np.array(seconds["ours"])
    rows = []
    for side in SIDES:
        low, median, high = np.quantile(seconds[side], (0, 0.5, 1))
        times = {"median_s": median, "min_s": low, "max_s": high}
        ratio = {"ratio_median": np.median(ratios), "ratio_min": ratios.min(), "ratio_max": ratios.max()}
        rows.append({"threads": threads, "side": side, "n": rounds, **times, **ratio})
    return rows


def write(rows: list[dict[str, object]], peaks: dict[str, int], vectors: str) -> None:
    """The page."""
    lines = [
        "# Full evaluation of Gowalla",
        "",
        f"{USERS:,} users x {ITEMS:,} items, d = {WIDTH}, NDCG@{K} and Recall@{K}; vectors: {vectors}. "
        f"Reference: torch {torch.__version__}, matmul + scatter + topk in blocks of {BLOCK:,} users. "
        f"Ours: kernel level {library.level()}. "
        "In turn in one process on a shared machine; ratio = reference / ours, round by round. Floor 1.5x, goal 3x.",
        "",
        "| threads | side | n | median s | min - max s | ratio median (min - max) | peak memory added, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = f"{row['ratio_median']:.1f} ({row['ratio_min']:.1f} - {row['ratio_max']:.1f})"
        lines.append(
            f"| {row['threads']} | {row['side']} | {row['n']} | {row['median_s']:.2f} | {row['min_s']:.2f} - "
            f"{row['max_s']:.2f} | {ratio if row['side'] == 'ours' else '1'} | {peaks[str(row['side'])]} |"
        )
    (RESULTS / "evaluation_speed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
