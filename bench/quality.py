"""Which entries to keep: Shaver against magnitude, frequency distance and chance, on ML-1M and Criteo-80k.

Every seed splits the data anew (8:1:1) and trains its own DeepFM. In this order:

1. ``valid``: every variant at every sparsity is judged on validation rows;
2. ``choice``: fill, score and exponent of Shaver are those with the best mean validation AUC over both sets;
3. ``test``: one read of the test rows per final cell, from the file that the variant wrote, noted in a ledger;
4. ``report``: hierarchical bootstrap (seeds, then rows) of the default minus every other variant; tables.

Every finished cell is a journal record under ``cache/quality``: killed and run again, the study goes on.

    OMP_NUM_THREADS=1 python bench/quality.py [--seeds 5] [--sets ml-1m criteo-80k] [--replicates 1000]
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from configs import (
    CACHE,
    CRITEO_80K,
    CRITEO_80K_TRAINING,
    ML_1M,
    ML_1M_TRAINING,
    RESULTS,
    criteo_80k,
    ml_1m,
    use_cache,
)
from torch import nn

from pocketrec.backbone import Model
from pocketrec.backbones import DeepFM
from pocketrec.dataset import Dataset
from pocketrec.files import Journal, open_arrays, save_arrays
from pocketrec.measure import Measurement, measure
from pocketrec.method import Method, Small, compress
from pocketrec.methods import FrequencyDistance, MagPrune, Random, Shaver
from pocketrec.run import Run
from pocketrec.statistics import Bootstrap, Interval, auc_statistic, bootstrap
from pocketrec.table import PrunedTable
from pocketrec.train import Training, train

SPARSITIES = (0.5, 0.8, 0.95, 0.99)
FILLS, SCORES, EXPONENTS = ("codebook", "zero"), ("abs", "rms", "geo", "signed"), (0.0, 0.25, 0.5)
BUDGETS = [f"sparsity={s}" for s in SPARSITIES]
TUNING = Training(epochs=1, batch_size=2048, learning_rate=1e-3, weight_decay=0.0)
FOLDER = CACHE / "quality"


@dataclass(frozen=True)
class Study:
    """One data set with its model and settings."""

    name: str
    data: Callable[[int], Dataset]
    backbone: DeepFM
    training: Training


STUDIES = {
    "ml-1m": Study("ml-1m", ml_1m, ML_1M, ML_1M_TRAINING),
    "criteo-80k": Study("criteo-80k", criteo_80k, CRITEO_80K, CRITEO_80K_TRAINING),
}
OTHERS: dict[str, Method] = {
    "magnitude": MagPrune(),
    "random, zero": Random(),
    "random, codebook": Random(fill="codebook"),
    "frequency distance": FrequencyDistance(),
}


def label(method: Shaver) -> str:
    """How a variant of Shaver is called in the tables."""
    return f"shaver {method.fill} {method.score} {method.exponent:g}"


SHAVERS = {
    label(m): m
    for m in (Shaver(fill=f, score=s, exponent=e) for f, s, e in product(FILLS, SCORES, EXPONENTS))  # type: ignore[arg-type]
}


class Cells:
    """Finished cells by key, kept in a journal."""

    def __init__(self) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(FOLDER / "cells.journal")
        self.done = {self._key(r): r for r in self.journal.read()}

    @staticmethod
    def _key(record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(record.get(k) for k in ("stage", "set", "seed", "label", "sparsity"))

    def has(self, **key: Any) -> bool:
        """Whether the cell is finished."""
        return self._key(key) in self.done

    def add(self, **record: Any) -> None:
        """Note a finished cell."""
        self.journal.append(record)
        self.done[self._key(record)] = record
        print(time.strftime("%H:%M:%S"), *record.values(), flush=True)

    def auc(self, stage: str, name: str, seed: int, variant: str, sparsity: float) -> float:
        """The figure of a finished cell."""
        return float(self.done[stage, name, seed, variant, sparsity]["auc"])


@cache
def dense(name: str, seed: int) -> tuple[Model, Dataset]:
    """The trained model of a seed, from the shared cache where it is there."""
    study = STUDIES[name]
    data = study.data(seed)
    with Run(FOLDER / f"{name}-{seed}", seed=seed, threads=1) as run:
        return train(study.backbone, data, run, study.training), data


def smaller(name: str, seed: int, method: Method) -> list[Small]:
    """The model at every sparsity."""
    model, data = dense(name, seed)
    with Run(FOLDER / f"{name}-{seed}", seed=seed, threads=1) as run:
        return compress(model, data, method, BUDGETS, run=run)


def with_trained_codebook(name: str, seed: int, small: Small) -> Small:
    """The same file with its fill rows trained: mask, kept entries and head stay, early stopping on validation."""
    table = small.table
    if not isinstance(table, PrunedTable):
        raise TypeError(f"Expected a pruned table, but got {type(table).__name__}.")
    fill = nn.Parameter(table.fill.clone())
    start = PrunedTable(table.schema, table.blocks, table.base.detach(), table.keep, fill, table.absent)
    model = deepcopy(small.model.with_table(start))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name == "table.fill")
    with Run(FOLDER / f"{name}-{seed}", seed=seed, threads=1) as run:
        tuned = run.fit("codebook", model, small.data, TUNING)
    learned = tuned.table.fill.detach()  # type: ignore[union-attr]
    tuned_table = PrunedTable.from_counts(
        table.schema, table.blocks, table.base.detach(), table.keep, learned, small.data.counts
    )
    return replace(small, model=small.model.with_table(tuned_table))


def validate(cells: Cells, name: str, seed: int) -> None:
    """Validation figures of every variant of one seed, and of the dense model."""
    if not cells.has(stage="valid", set=name, seed=seed, label="dense", sparsity=0.0):
        model, data = dense(name, seed)
        note(cells, measure(model, data.valid, latency=False), "valid", name, seed, "dense", 0.0)
    for variant, method in {**OTHERS, **SHAVERS}.items():
        if all(cells.has(stage="valid", set=name, seed=seed, label=variant, sparsity=s) for s in SPARSITIES):
            continue
        for sparsity, small in zip(SPARSITIES, smaller(name, seed, method), strict=True):
            result = measure(small.model, small.data.valid, latency=False)
            note(cells, result, "valid", name, seed, variant, sparsity)


def note(cells: Cells, result: Measurement, stage: str, name: str, seed: int, variant: str, sparsity: float) -> None:
    """Add a cell, unless it is there."""
    if not cells.has(stage=stage, set=name, seed=seed, label=variant, sparsity=sparsity):
        cells.add(stage=stage, set=name, seed=seed, label=variant, sparsity=sparsity, **result.quality)


def mean_valid(cells: Cells, variant: str, names: list[str], seeds: int) -> float:
    """Mean validation AUC over sets, seeds and sparsities."""
    grid = product(names, range(seeds), SPARSITIES)
    return float(np.mean([cells.auc("valid", n, s, variant, sparsity) for n, s, sparsity in grid]))


def choose(cells: Cells, names: list[str], seeds: int) -> tuple[Shaver, dict[str, Method]]:
    """The default of Shaver, and the variants that are tested: per fill and score, the best exponent on validation."""
    figures = {variant: mean_valid(cells, variant, names, seeds) for variant in SHAVERS}
    default = SHAVERS[max(figures, key=figures.__getitem__)]
    best = {}
    for fill, score in product(FILLS, SCORES):
        group = [v for v, m in SHAVERS.items() if (m.fill, m.score) == (fill, score)]
        variant = max(group, key=figures.__getitem__)
        best[variant] = SHAVERS[variant]
    ablation = replace(default, fill="plain")
    return default, {**best, label(ablation): ablation, **OTHERS}


def test(cells: Cells, name: str, seed: int, variants: dict[str, Method]) -> None:
    """One read of the test rows per cell, from the written file, with its logits kept."""
    if not cells.has(stage="test", set=name, seed=seed, label="dense", sparsity=0.0):
        model, data = dense(name, seed)
        result = measure(model, data.test, latency=False, predictions=True, ledger=ledger(name, seed, "dense", 0.0))
        finish(cells, result, name, seed, "dense", 0.0)
    for variant, method in variants.items():
        if tested(cells, name, seed, variant):
            continue
        for sparsity, small in zip(SPARSITIES, smaller(name, seed, method), strict=True):
            test_file(cells, name, seed, variant, sparsity, small)


def test_trained(cells: Cells, name: str, seed: int, default: Shaver) -> None:
    """The default with its codebook trained."""
    if tested(cells, name, seed, trained_label(default)):
        return
    for sparsity, small in zip(SPARSITIES, smaller(name, seed, default), strict=True):
        if not cells.has(stage="test", set=name, seed=seed, label=trained_label(default), sparsity=sparsity):
            tuned = with_trained_codebook(name, seed, small)
            test_file(cells, name, seed, trained_label(default), sparsity, tuned)


def tested(cells: Cells, name: str, seed: int, variant: str) -> bool:
    """Whether all cells of a variant are finished."""
    return all(cells.has(stage="test", set=name, seed=seed, label=variant, sparsity=s) for s in SPARSITIES)


def trained_label(default: Shaver) -> str:
    """The name of the default with its codebook trained."""
    return f"{label(default)}, trained codebook"


def test_file(cells: Cells, name: str, seed: int, variant: str, sparsity: float, small: Small) -> None:
    """Write, measure, note."""
    if cells.has(stage="test", set=name, seed=seed, label=variant, sparsity=sparsity):
        return
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        path = Path(folder) / "small.safetensors"
        small.save(path)
        noted = ledger(name, seed, variant, sparsity)
        result = measure(path, small.data.test, latency=False, predictions=True, ledger=noted)
    finish(cells, result, name, seed, variant, sparsity)


def ledger(name: str, seed: int, variant: str, sparsity: float) -> Callable[..., None]:
    """Notes a read of test rows, with the cell that it was for."""
    journal = Journal(FOLDER / "ledger.journal")
    return lambda **record: journal.append(
        {"set": name, "seed": seed, "label": variant, "sparsity": sparsity, **record}
    )


def finish(cells: Cells, result: Measurement, name: str, seed: int, variant: str, sparsity: float) -> None:
    """Keep the logits, then note the cell."""
    logits = logits_file(name, seed, variant, sparsity)
    logits.parent.mkdir(exist_ok=True)
    save_arrays(logits, {"logits": np.asarray(result.logits)})
    note(cells, result, "test", name, seed, variant, sparsity)


def logits_file(name: str, seed: int, variant: str, sparsity: float) -> Path:
    """Where a cell's test logits are."""
    return FOLDER / "logits" / f"{name}-{seed}-{variant.replace(' ', '_').replace(',', '')}-{sparsity}.safetensors"


def resample(name: str, seeds: int, variants: list[str], sparsity: float, replicates: int) -> Bootstrap:
    """Bootstrap of mean test AUC for all variants at one sparsity, with common draws."""
    labels = [np.asarray(STUDIES[name].data(seed).test.labels) for seed in range(seeds)]

    def logits(variant: str, seed: int) -> np.ndarray:
        place = logits_file(name, seed, variant, 0.0 if variant == "dense" else sparsity)
        return open_arrays(place)[0]["logits"]

    statistics = {v: [auc_statistic(labels[s], logits(v, s)) for s in range(seeds)] for v in variants}
    return bootstrap(statistics, [len(y) for y in labels], replicates=replicates)


def report(cells: Cells, name: str, seeds: int, default: Shaver, variants: list[str], replicates: int) -> None:
    """The csv and the page of one data set."""
    compared = [v for v in ("dense", *variants) if v != label(default)]
    differences: dict[tuple[str, float], Interval] = {}
    for sparsity in SPARSITIES:
        result = resample(name, seeds, ["dense", *variants], sparsity, replicates)
        differences |= {(v, sparsity): result.difference(label(default), v) for v in compared}
    stem = RESULTS / f"quality_{name.replace('-', '')}"
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["stage", "set", "seed", "label", "sparsity", "auc", "logloss"])
        for r in cells.done.values():
            if r["set"] == name:
                writer.writerow([r[k] for k in ("stage", "set", "seed", "label", "sparsity", "auc", "logloss")])
    stem.with_suffix(".md").write_text(page(cells, name, seeds, default, variants, differences, replicates))


def page(
    cells: Cells,
    name: str,
    seeds: int,
    default: Shaver,
    variants: list[str],
    differences: dict[tuple[str, float], Interval],
    replicates: int,
) -> str:
    """Markdown: figures, differences, validation."""
    study = STUDIES[name]
    data = [study.data(s) for s in range(seeds)]
    columns = "".join(f" | {s:.0%}" for s in SPARSITIES)
    rule = "|---" * (len(SPARSITIES) + 1) + "|"

    def row(stage: str, variant: str) -> str:
        found = [[cells.auc(stage, name, s, variant, sparsity) for s in range(seeds)] for sparsity in SPARSITIES]
        return f"| {variant} | " + " | ".join(f"{np.mean(f):.4f} ± {np.std(f, ddof=1):.4f}" for f in found) + " |"

    dense_test = [cells.auc("test", name, s, "dense", 0.0) for s in range(seeds)]
    lines = [
        f"# {name}: AUC of pruned DeepFM",
        "",
        f"{seeds} seeds, each with its own 8:1:1 split and model ({len(data[0].train):,} training rows, "
        f"{len(data[0].test):,} test rows, {data[0].schema.rows:,} table rows); `{study.backbone}`, "
        f"`{study.training}`.",
        f"Dense test AUC {np.mean(dense_test):.4f} ± {np.std(dense_test, ddof=1):.4f}. No retraining after pruning, "
        "but for the row `trained codebook`. Test rows were read once per cell, from the written fp32 file "
        "(`quality_ledger.csv`).",
        "",
        f"Default, chosen by mean validation AUC over {', '.join(STUDIES)}: **{label(default)}** "
        "(fill, score, exponent of the training count that divides the score).",
        "",
        "## Test AUC (mean ± standard deviation over seeds) by share of values removed",
        "",
        f"| variant{columns} |",
        rule,
        *(row("test", v) for v in variants),
        "",
        "## Default minus variant: test AUC, 95 % interval",
        "",
        f"Hierarchical bootstrap, seeds then rows, {replicates} replicates, common draws.",
        "",
        f"| variant{columns} |",
        rule,
        *(
            f"| {v} | " + " | ".join(str(differences[v, s]) for s in SPARSITIES) + " |"
            for v in ("dense", *variants)
            if v != label(default)
        ),
        "",
        "## Validation AUC of every variant",
        "",
        f"| variant{columns} |",
        rule,
        *(row("valid", v) for v in (*SHAVERS, *OTHERS)),
        "",
    ]
    return "\n".join(lines)


def write_ledger() -> None:
    """The ledger of test reads as csv."""
    records = Journal(FOLDER / "ledger.journal").read()
    with (RESULTS / "quality_ledger.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["set", "seed", "label", "sparsity", "split", "rows", "data", "digest"],
                                extrasaction="ignore")  # fmt: skip
        writer.writeheader()
        writer.writerows(records)


def parse() -> argparse.Namespace:
    """Arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--only", choices=("valid", "all"), default="all")
    return parser.parse_args()


def main() -> None:
    """All four stages."""
    options = parse()
    torch.set_num_threads(1)
    use_cache()
    cells = Cells()
    grid: Iterator[tuple[int, str]] = product(range(options.seeds), options.sets)
    for seed, name in grid:
        validate(cells, name, seed)
        dense.cache_clear()
    if options.only == "valid":
        sys.exit()
    default, variants = choose(cells, options.sets, options.seeds)
    print("default:", label(default), flush=True)
    for seed, name in product(range(options.seeds), options.sets):
        test(cells, name, seed, variants)
        dense.cache_clear()
    write_reports(cells, options, default, list(variants))
    for seed, name in product(range(options.seeds), options.sets):
        test_trained(cells, name, seed, default)
        dense.cache_clear()
    write_reports(cells, options, default, [*variants, trained_label(default)])


def write_reports(cells: Cells, options: argparse.Namespace, default: Shaver, variants: list[str]) -> None:
    """Ledger and pages of what has been tested."""
    write_ledger()
    for name in options.sets:
        report(cells, name, options.seeds, default, variants, options.replicates)
        print("written:", name, flush=True)


if __name__ == "__main__":
    main()
