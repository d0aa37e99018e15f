"""What searches of PEP leave on Gowalla: LightGCN at 95 % and NeuMF at 80 %, judged on validation alone.

    python bench/pep_searches.py STORE

Each line is one search and the training after it, with the backbones of the plans ``gowalla`` and ``neumf``, seed 0 and
one thread; the plans' own settings come first. ``threshold`` is the median at the end of the search, ``alive`` the
share of entries above their own then, ``searched`` the NDCG@20 of the model as the search left it, where the training
goes on from there, and ``trained`` that of the pruned and retrained one. Needs POCKETREC_DATA; trainings that the store
has are read, and the others take about two hours. Writes ``bench/results/pep_searches.md``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from configs import LIGHTGCN, LIGHTGCN_COOLING, LIGHTGCN_TRAINING, RESULTS, ranking_data

from pocketrec.backbone import Backbone
from pocketrec.backbones.neumf import NeuMF
from pocketrec.dataset import Dataset
from pocketrec.method import compress
from pocketrec.methods.pep import PEP
from pocketrec.run import Run
from pocketrec.train import Training, validate

FAST = replace(LIGHTGCN_TRAINING, patience=20)
SLOW = replace(FAST, learning_rate=4e-3)
EXACT = replace(SLOW, precision="fp32")
PAIRS = Training(learning_rate=2e-3, weight_decay=0.0, patience=9)
COOL = replace(PAIRS, learning_rate=4e-4)

NEUMF = NeuMF(dropout=0.5, regularisation=1e-3)


def stages(*parts: tuple[Training, int]) -> tuple[Training, ...]:
    """Trainings, each for so many epochs."""
    return tuple(replace(training, epochs=epochs) for training, epochs in parts)


PRUNED = PEP(scope="block", restart="found")
TRIALS: tuple[tuple[str, Backbone, str, PEP], ...] = (
    (
        "8 epochs, gone on with",
        LIGHTGCN,
        "sparsity=0.95",
        replace(PRUNED, search_epochs=8, training=stages((LIGHTGCN_TRAINING, 3), (LIGHTGCN_COOLING, 6))),
    ),
    (
        "1 epoch, gone on with",
        LIGHTGCN,
        "sparsity=0.95",
        replace(PRUNED, search_epochs=1, reach=0.5, training=stages((FAST, 3), (EXACT, 2))),
    ),
    (
        "1 epoch, from the first values",
        LIGHTGCN,
        "sparsity=0.95",
        replace(PRUNED, search_epochs=1, reach=0.5, restart="first", training=stages((FAST, 6), (EXACT, 2))),
    ),
    (
        "3 epochs at a third of the rate, high thresholds, gone on with",
        LIGHTGCN,
        "sparsity=0.95",
        replace(
            PRUNED,
            search_epochs=3,
            threshold_rate=0.0112,
            training=stages((SLOW, 2), (replace(EXACT, learning_rate=1e-3), 1)),
        ),
    ),
    (
        "4 epochs, from the first values",
        NEUMF,
        "sparsity=0.8",
        replace(PRUNED, search_epochs=4, reach=0.1, restart="first", training=stages((PAIRS, 9), (COOL, 2))),
    ),
    (
        "4 epochs, gone on with",
        NEUMF,
        "sparsity=0.8",
        replace(PRUNED, search_epochs=4, reach=0.1, training=stages((PAIRS, 3), (COOL, 2))),
    ),
    (
        "4 epochs, high thresholds, gone on with",
        NEUMF,
        "sparsity=0.8",
        replace(PRUNED, search_epochs=4, threshold_rate=0.00618, training=stages((PAIRS, 3), (COOL, 2))),
    ),
)


def tried(backbone: Backbone, budget: str, method: PEP, data: Dataset, run: Run) -> str:
    """The figures of a trial, as cells."""
    model = backbone.build(data, run.seed)
    ladder = method.prepare(model, data, run)
    alive = ladder.found.alive()
    threshold = float(ladder.found.threshold.detach().sigmoid().median())
    searched = f"{validate(ladder.start, data.valid):.4f}" if method.restart == "found" else "–"
    trained = validate(compress(model, data, method, budget, run=run).model, data.valid)
    return f"{threshold:.3f} | {alive[-1] / alive[0]:.3f} | {searched} | {trained:.4f}"


def main() -> None:
    """Search, train, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = ranking_data("gowalla")
    lines = ["| model | budget | search | threshold | alive | searched | trained |", "|---|---|---|" + "---:|" * 4]
    with Run(None, seed=0, threads=1, store=options.store) as run:
        for words, backbone, budget, method in TRIALS:
            figures = tried(backbone, budget, method, data, run)
            lines.append(f"| {backbone.name} | {budget} | {words} | {figures} |")
            print(lines[-1], flush=True)
    text = (__doc__ or "").split("\n")[0]
    (RESULTS / "pep_searches.md").write_text(f"# Searches of PEP\n\n{text}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
