"""LightGCN on Gowalla with 50, 80 and 95 % of its values removed at once, without retraining.

``ego``: the model's own table is pruned and then propagated with the graph, as in the published study. ``baked``: the
final vectors are pruned, as a device keeps them. In this order:

1. ``valid``: every method at every sparsity, and every scope and ``n_min`` of magnitude pruning on the first seed, is
   judged by NDCG@20 on validation pairs;
2. ``test``: one read of the test pairs per final cell, from the file that the method wrote, noted in a ledger;
3. ``report``: hierarchical bootstrap (seeds, then users) of Shaver minus magnitude pruning; tables.

Every finished cell is a journal record under ``cache/lightgcn_pruned``: killed and run again, the study goes on.

    OMP_NUM_THREADS=1 POCKETREC_DATA=... python bench/lightgcn_pruned.py [--seeds 0 1 2] [--replicates 1000]
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from configs import CACHE, LIGHTGCN, RESULTS, lightgcn, ranking_data
from numpy.typing import NDArray

from pocketrec.backbone import Model
from pocketrec.files import Journal, open_arrays, save_arrays
from pocketrec.measure import Measurement, measure
from pocketrec.method import Method, Small, compress
from pocketrec.methods import FrequencyDistance, MagPrune, Random, Shaver
from pocketrec.run import Run
from pocketrec.statistics import Bootstrap, bootstrap, mean_statistic

SPARSITIES, KINDS = (0.5, 0.8, 0.95), ("ego", "baked")
PUBLISHED = {0.5: (0.1447, 0.1761), 0.8: (0.1257, 0.1528), 0.95: (0.0365, 0.0474)}
FIGURES = ("ndcg@20", "recall@20", "recall_capped@20")
FOLDER = CACHE / "lightgcn_pruned"
METHODS: dict[str, Method] = {
    "shaver": Shaver(),
    "shaver, zero fill": Shaver(fill="zero"),
    "shaver, BPR loss": Shaver(top=0, fill="zero", exponent=0.0, masks=8),
    "frequency distance": FrequencyDistance(fill="zero"),
    "random": Random(),
}
MAGNITUDES = {f"magnitude {s} {n}": MagPrune(s, n) for s, n in product(("joint", "block"), (0, 1, 2, 4, 8))}  # type: ignore[arg-type]
WIDTH = LIGHTGCN.dim


class Cells:
    """Finished cells by stage, seed, kind, label and sparsity, kept in a journal."""

    def __init__(self) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(FOLDER / "cells.journal")
        self.done = {self._key(r): r for r in self.journal.read()}

    @staticmethod
    def _key(record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(record[k] for k in ("stage", "seed", "kind", "label", "sparsity"))

    def has(self, *key: Any) -> bool:
        """Whether the cell is finished."""
        return key in self.done

    def add(self, stage: str, seed: int, kind: str, label: str, sparsity: float, result: Measurement) -> None:
        """Note a finished cell."""
        record = {"stage": stage, "seed": seed, "kind": kind, "label": label, "sparsity": sparsity, **result.quality}
        self.journal.append(record)
        self.done[self._key(record)] = record
        print(time.strftime("%H:%M:%S"), *record.values(), flush=True)

    def mean(self, stage: str, seeds: Sequence[int], kind: str, label: str, sparsity: float, figure: str) -> float:
        """Mean figure over seeds."""
        return float(np.mean([self.done[stage, s, kind, label, sparsity][figure] for s in seeds]))


@cache
def dense(seed: int) -> Model:
    """The trained model of a seed."""
    model, run = lightgcn("gowalla", seed)
    run.close()
    return model


def smaller(seed: int, kind: str, method: Method, sparsity: float) -> Small:
    """The model of a seed, compressed; what a method prepares is kept."""
    with Run(FOLDER / f"gowalla-{seed}", seed=seed, threads=1) as run:
        data = ranking_data("gowalla")
        return compress(dense(seed), data, method, f"sparsity={sparsity}", run=run, bake=kind == "baked")


def validate(cells: Cells, seed: int, kind: str, label: str, method: Method, sparsity: float) -> None:
    """Validation figures of one cell."""
    if not cells.has("valid", seed, kind, label, sparsity):
        small = smaller(seed, kind, method, sparsity)
        cells.add("valid", seed, kind, label, sparsity, measure(small.model, small.data.valid, latency=False))


def magnitude(cells: Cells, seed: int, kind: str, sparsity: float) -> MagPrune:
    """The scope and ``n_min`` that validation prefers."""
    feasible = {label: m for label, m in MAGNITUDES.items() if m.n_min <= int(WIDTH * (1 - sparsity) + 1e-9)}
    for label, method in feasible.items():
        validate(cells, seed, kind, label, method, sparsity)
    return max(feasible.items(), key=lambda item: cells.done["valid", seed, kind, item[0], sparsity]["ndcg@20"])[1]


def test(cells: Cells, seed: int, kind: str, label: str, method: Method, sparsity: float) -> None:
    """One read of the test pairs, from the written file; figures per user are kept."""
    if cells.has("test", seed, kind, label, sparsity):
        return
    small = smaller(seed, kind, method, sparsity)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        path = Path(folder) / "small.safetensors"
        small.save(path)
        finish(cells, seed, kind, label, sparsity, path)


def finish(cells: Cells, seed: int, kind: str, label: str, sparsity: float, target: Path | Model) -> None:
    """Measure, note the read and the cell."""
    journal = Journal(FOLDER / "ledger.journal")
    named = {"seed": seed, "kind": kind, "label": label, "sparsity": sparsity}
    data = ranking_data("gowalla")
    result = measure(target, data.test, latency=False, ledger=lambda **record: journal.append({**named, **record}))
    if result.ranking is None:
        raise TypeError("Expected figures per user, but got none.")
    save_arrays(users_file(seed, kind, label, sparsity), {"ndcg": result.ranking.ndcg}, {})
    cells.add("test", seed, kind, label, sparsity, result)


def users_file(seed: int, kind: str, label: str, sparsity: float) -> Path:
    """Where a cell's test NDCG per user is."""
    return FOLDER / f"users-{seed}-{kind}-{label.replace(' ', '_').replace(',', '')}-{sparsity}.safetensors"


def study(cells: Cells, seed: int, first: int) -> None:
    """All cells of one seed."""
    if not cells.has("valid", seed, "ego", "original", 0.0):
        data = ranking_data("gowalla")
        cells.add("valid", seed, "ego", "original", 0.0, measure(dense(seed), data.valid, latency=False))
    if not cells.has("test", seed, "ego", "original", 0.0):
        finish(cells, seed, "ego", "original", 0.0, dense(seed))
    for sparsity, kind in product(reversed(SPARSITIES), KINDS):
        for label, method in {**METHODS, "magnitude": magnitude(cells, first, kind, sparsity)}.items():
            validate(cells, seed, kind, label, method, sparsity)
            test(cells, seed, kind, label, method, sparsity)


def resample(seeds: Sequence[int], kind: str, sparsity: float, replicates: int) -> Bootstrap:
    """Bootstrap of mean test NDCG@20 with common draws."""

    def users(seed: int, label: str) -> NDArray[np.float64]:
        return open_arrays(users_file(seed, kind, label, sparsity))[0]["ndcg"]

    labels = (*METHODS, "magnitude")
    figures = {label: [mean_statistic(users(s, label)) for s in seeds] for label in labels}
    size = len(users(seeds[0], "magnitude"))
    return bootstrap(figures, [size] * len(seeds), replicates=replicates, shared_rows=True)


def report(cells: Cells, seeds: Sequence[int], replicates: int) -> None:
    """The csv files and the page."""
    columns = ["stage", "seed", "kind", "label", "sparsity", *FIGURES]
    write_csv("lightgcn_pruned.csv", columns, list(cells.done.values()))
    ledger = ["seed", "kind", "label", "sparsity", "reader", "split", "rows", "data", "digest"]
    write_csv("lightgcn_pruned_ledger.csv", ledger, Journal(FOLDER / "ledger.journal").read())
    lines = [
        "# LightGCN on Gowalla, pruned at once", "",
        f"{LIGHTGCN}; seeds {', '.join(map(str, seeds))}. Test figures, one read per cell, from the written fp32 file "
        "(`lightgcn_pruned_ledger.csv`); mean over seeds, NDCG@20 with its least and largest. Nothing is retrained.",
        "Shaver's game and exponents, and the scope and `n_min` of magnitude pruning, were chosen on validation pairs "
        f"(magnitude: on seed {seeds[0]}). The published rows prune the ego table.", "",
        "| table | sparsity | method | valid NDCG@20 | NDCG@20 | kept | least | most | recall@20 | capped recall@20 |",
        "|" + "---|" * 10,
        *original(cells, seeds),
        *(line for kind, s in product(KINDS, SPARSITIES) for line in rows(cells, seeds, kind, s)), "",
        "## Shaver minus the other methods: test NDCG@20, 95 % interval", "",
        f"Hierarchical bootstrap, seeds then users, {replicates} replicates, common draws.", "",
        "| table | sparsity | " + " | ".join(label for label in (*METHODS, "magnitude") if label != "shaver") + " |",
        "|" + "---|" * (len(METHODS) + 2),
        *(differences(seeds, kind, s, replicates) for kind, s in product(KINDS, SPARSITIES)), "",
    ]  # fmt: skip
    (RESULTS / "lightgcn_pruned.md").write_text("\n".join(lines))


def original(cells: Cells, seeds: Sequence[int]) -> list[str]:
    """The lines of the dense model, ours and the published one."""
    published = "| | 0 % | original, published | | 0.1470 | 100.0 % | | | | 0.1787 |"
    return [line(cells, seeds, "ego", "original", 0.0), published]


def rows(cells: Cells, seeds: Sequence[int], kind: str, sparsity: float) -> list[str]:
    """The lines of one table and sparsity, magnitude last, with what was published."""
    ndcg, recall = PUBLISHED[sparsity]
    published = (
        f"| {kind} | {sparsity:.0%} | magnitude, published | | {ndcg:.4f} | {ndcg / 0.147:.1%} | | | | {recall:.4f} |"
    )
    lines = [line(cells, seeds, kind, label, sparsity) for label in (*METHODS, "magnitude")]
    return [*lines, published] if kind == "ego" else lines


def line(cells: Cells, seeds: Sequence[int], kind: str, label: str, sparsity: float) -> str:
    """One line of figures; ``kept`` is the share of the dense model's NDCG@20."""
    valid = cells.mean("valid", seeds, kind, label, sparsity, "ndcg@20")
    ndcg, recall, capped = (cells.mean("test", seeds, kind, label, sparsity, figure) for figure in FIGURES)
    kept = ndcg / cells.mean("test", seeds, "ego", "original", 0.0, "ndcg@20")
    single = [cells.done["test", s, kind, label, sparsity]["ndcg@20"] for s in seeds]
    return (
        f"| {kind} | {sparsity:.0%} | {label} | {valid:.4f} | {ndcg:.4f} | {kept:.1%} | {min(single):.4f} | "
        f"{max(single):.4f} | {recall:.4f} | {capped:.4f} |"
    )


def differences(seeds: Sequence[int], kind: str, sparsity: float, replicates: int) -> str:
    """One line of paired intervals."""
    drawn = resample(seeds, kind, sparsity, replicates)
    others = [label for label in (*METHODS, "magnitude") if label != "shaver"]
    return f"| {kind} | {sparsity:.0%} | " + " | ".join(str(drawn.difference("shaver", o)) for o in others) + " |"


def write_csv(name: str, columns: list[str], records: list[dict[str, Any]]) -> None:
    """The listed columns of the records."""
    with (RESULTS / name).open("w", newline="") as stream:
        table = csv.DictWriter(stream, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(records)


def main() -> None:
    """All stages; the page is written anew after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--replicates", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells()
    for done, seed in enumerate(options.seeds, start=1):
        study(cells, seed, options.seeds[0])
        report(cells, options.seeds[:done], options.replicates)
        dense.cache_clear()


if __name__ == "__main__":
    main()
