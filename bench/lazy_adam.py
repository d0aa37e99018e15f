"""Does lazy Adam train the same model as dense Adam? DeepFM on MovieLens-1M, paired seeds, and the tables pruned.

    POCKETREC_DATA=... python bench/lazy_adam.py

Seed ``s`` splits the data, initialises the model and orders the batches; both optimisers get the same of each. The
checkpoint is chosen on validation rows, the figures are of test rows. Trained models stay in ``cache/``, so a second
call goes on where the first was stopped. Writes ``bench/results/lazy_adam.csv`` and ``.md``.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import replace

import numpy as np
import torch
from configs import ML_1M, ML_1M_TRAINING, RESULTS, ml_1m, use_cache

from pocketrec.compression.compress import compress
from pocketrec.evaluation.statistics import paired_t
from pocketrec.methods.mag_prune import MagPrune
from pocketrec.training.evaluate import validate
from pocketrec.training.run import Run
from pocketrec.training.train import train

OPTIMIZERS = ("adam", "lazy_adam")
SPARSITIES = (0.0, 0.5, 0.8, 0.95)


def figures(seed: int) -> dict[tuple[str, float], float]:
    """Test AUC of both optimisers at each sparsity."""
    data = ml_1m(seed)
    found = {}
    for optimizer in OPTIMIZERS:
        model = train(ML_1M, data, Run(None, seed=seed), replace(ML_1M_TRAINING, optimizer=optimizer))
        found[optimizer, 0.0] = validate(model, data.test) or math.nan
        budgets = [f"sparsity={s}" for s in SPARSITIES[1:]]
        for sparsity, small in zip(SPARSITIES[1:], compress(model, data, MagPrune(), budgets), strict=True):
            pruned = model.with_table(small.model.table)
            found[optimizer, sparsity] = validate(pruned, data.test) or math.nan
    return found


def write(by_seed: dict[int, dict[tuple[str, float], float]]) -> None:
    """One csv row per seed, optimiser and sparsity; one table with paired intervals."""
    with (RESULTS / "lazy_adam.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("seed", "optimizer", "sparsity", "test_auc"))
        for seed, found in by_seed.items():
            rows.writerows((seed, optimizer, sparsity, f"{v:.6f}") for (optimizer, sparsity), v in found.items())
    lines = [
        "# Lazy Adam against dense Adam: DeepFM on MovieLens-1M",
        "",
        f"`python bench/lazy_adam.py`; {len(by_seed)} paired seeds, each its own split 8:1:1; test AUC of the",
        "checkpoint that validation chose. Sparsity: share of embedding values removed by MagPrune. Intervals: 95 %,",
        "paired t.",
        "",
        f"Model: `{ML_1M}`",
        "",
        f"Training: `{ML_1M_TRAINING}`",
        "",
        "| sparsity | dense | lazy | lazy - dense | 95 % interval | bound | within |",
        "|---|---|---|---|---|---|---|",
    ]
    for sparsity in SPARSITIES:
        dense, lazy = ([found[o, sparsity] for found in by_seed.values()] for o in OPTIMIZERS)
        interval = paired_t(lazy, dense)
        bound = 0.001 if sparsity == 0 else 0.002
        lines.append(
            f"| {sparsity:.0%} | {np.mean(dense):.5f} | {np.mean(lazy):.5f} | {interval.estimate:+.5f} | "
            f"[{interval.low:+.5f}, {interval.high:+.5f}] | {bound} | {'yes' if interval.within(bound) else 'no'} |"
        )
    (RESULTS / "lazy_adam.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    torch.set_num_threads(1)
    use_cache()
    collected = {}
    for seed in range(parser.parse_args().seeds):
        collected[seed] = figures(seed)
        print(seed, {f"{o} {s:g}": round(v, 5) for (o, s), v in collected[seed].items()}, flush=True)
        if len(collected) > 1:
            write(collected)
