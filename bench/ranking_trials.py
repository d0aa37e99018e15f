"""What was tried on Gowalla for the cells that fell short, judged on validation alone: PEP and QR.

    python bench/ranking_trials.py STORE

Each line is one training with the backbones of the plans ``gowalla`` and ``neumf``, seed 0 and one thread. For PEP,
``threshold`` is the median at the end of the search, ``alive`` the share of entries above their own then, ``searched``
the NDCG@20 of the model as the search left it, where the training goes on from there; ``trained`` is that of the pruned
and retrained model, or of QR's. Needs POCKETREC_DATA; trainings that the store has are read, and the others take about
three hours. Writes ``bench/results/ranking_trials.md``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from configs import LIGHTGCN, LIGHTGCN_COOLING, LIGHTGCN_TRAINING, RESULTS, ranking_data

from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.backbones.neumf import NeuMF
from pocketrec.compression.compress import compress
from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.families.retraining import Retrain, initial_model
from pocketrec.families.sharing import BlockSharing
from pocketrec.families.thresholds import ThresholdSearch
from pocketrec.methods.pep import PEP
from pocketrec.methods.qr import QR
from pocketrec.models.backbone import Backbone
from pocketrec.training.evaluate import validate
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

FAST = replace(LIGHTGCN_TRAINING, patience=20)
SLOW = replace(FAST, learning_rate=4e-3)
EXACT = replace(SLOW, precision="fp32")
PAIRS = Training(learning_rate=2e-3, weight_decay=0.0, patience=9)
COOL = replace(PAIRS, learning_rate=4e-4)

NEUMF = NeuMF(dropout=0.5, regularisation=1e-3)


def stages(*parts: tuple[Training, int]) -> tuple[Training, ...]:
    """Trainings, each for so many epochs."""
    return tuple(replace(training, epochs=epochs) for training, epochs in parts)


def ranker(**changes: float) -> LightGCN:
    """LightGCN of the plan, but for some settings."""
    return replace(LIGHTGCN, **changes)


def pep(
    *training: tuple[Training, int],
    values: Literal["first", "found"] = "found",
    scope: BlockSharing = "joint",
    **search: Any,
) -> tuple[Method, tuple[Training, ...]]:
    """PEP that goes on from what its search found, and how it trains."""
    return PEP(search=ThresholdSearch(**search), retrain=Retrain(values=values), scope=scope), stages(*training)


def qr(training: Training, epochs: int, **settings: Any) -> tuple[Method, tuple[Training, ...]]:
    """QR of the plan, and how it trains, without its second stage."""
    return QR(**{"init": "uniform", **settings}), stages((training, epochs))


TRIALS: tuple[tuple[str, Backbone, str, tuple[Method, tuple[Training, ...]]], ...] = (
    (
        "each table the same share, 8 epochs",
        LIGHTGCN,
        "sparsity=0.95",
        pep((LIGHTGCN_TRAINING, 3), (LIGHTGCN_COOLING, 6), scope="block", epochs=8),
    ),
    (
        "the same, 1 epoch",
        LIGHTGCN,
        "sparsity=0.95",
        pep((FAST, 3), (EXACT, 2), scope="block", epochs=1, reach=0.5),
    ),
    (
        "the same, 1 epoch, from the first values",
        LIGHTGCN,
        "sparsity=0.95",
        pep((FAST, 6), (EXACT, 2), scope="block", epochs=1, reach=0.5, values="first"),
    ),
    (
        "the same, 3 epochs at a third of the rate, high thresholds",
        LIGHTGCN,
        "sparsity=0.95",
        pep((SLOW, 2), (replace(EXACT, learning_rate=1e-3), 1), scope="block", epochs=3, rate=0.0112),
    ),
    (
        "both tables together, contrast .1, 8 epochs",
        ranker(contrast=0.1),
        "sparsity=0.95",
        pep((FAST, 4), (SLOW, 4), epochs=8),
    ),
    (
        "the same, high thresholds",
        ranker(contrast=0.1),
        "sparsity=0.95",
        pep((FAST, 2), (SLOW, 1), epochs=8, rate=0.0053),
    ),
    (
        "the same, 6 epochs at half the rate",
        ranker(contrast=0.1),
        "sparsity=0.95",
        pep((replace(FAST, learning_rate=6e-3), 3), epochs=6, rate=0.0072),
    ),
    (
        "the same, 5 epochs, regularisation .01",
        ranker(contrast=0.1, regularisation=1e-2),
        "sparsity=0.95",
        pep((FAST, 2), epochs=5, rate=0.0085),
    ),
    (
        "the same, 5 epochs, contrast .03",
        ranker(contrast=0.03),
        "sparsity=0.95",
        pep((FAST, 2), epochs=5, rate=0.0085),
    ),
    (
        "the same, 5 epochs, contrast .2",
        ranker(contrast=0.2),
        "sparsity=0.95",
        pep((FAST, 2), epochs=5, rate=0.0085),
    ),
    (
        "the same, 5 epochs, contrast .1, thresholds decay at 5e-7",
        ranker(contrast=0.1),
        "sparsity=0.95",
        pep((FAST, 2), epochs=5, rate=0.0085, decay=5e-7),
    ),
    (
        "the same, thresholds decay at 5e-8",
        ranker(contrast=0.1),
        "sparsity=0.95",
        pep((FAST, 2), epochs=5, rate=0.0085, decay=5e-8),
    ),
    (
        "the same, 12 epochs, contrast .13, high thresholds",
        ranker(contrast=0.13),
        "sparsity=0.95",
        pep((FAST, 1), (SLOW, 1), epochs=12, rate=0.0035),
    ),
    (
        "each table the same share, 4 epochs, from the first values",
        NEUMF,
        "sparsity=0.8",
        pep((PAIRS, 9), (COOL, 2), scope="block", epochs=4, reach=0.1, values="first"),
    ),
    (
        "the same, gone on with",
        NEUMF,
        "sparsity=0.8",
        pep((PAIRS, 3), (COOL, 2), scope="block", epochs=4, reach=0.1),
    ),
    (
        "the same, high thresholds",
        NEUMF,
        "sparsity=0.8",
        pep((PAIRS, 3), (COOL, 2), scope="block", epochs=4, rate=0.00618),
    ),
    ("all tables together, 4 epochs", NEUMF, "sparsity=0.8", pep((PAIRS, 3), (COOL, 2), epochs=4, reach=0.1)),
    (
        "the same, from the first values",
        NEUMF,
        "sparsity=0.8",
        pep((PAIRS, 9), (COOL, 2), epochs=4, reach=0.1, values="first"),
    ),
    ("the same, 7 epochs, gone on with", NEUMF, "sparsity=0.8", pep((PAIRS, 2), (COOL, 2), epochs=7, reach=0.1)),
    ("product, 9 epochs", LIGHTGCN, "sparsity=0.8", qr(LIGHTGCN_TRAINING, 9)),
    ("contrast .4, 9 epochs", ranker(contrast=0.4), "sparsity=0.8", qr(FAST, 9)),
    (
        "halves side by side, normal first values, 9 epochs",
        LIGHTGCN,
        "sparsity=0.8",
        qr(FAST, 9, operation="concat", init="normal"),
    ),
    (
        "one pair of tables for users and items, 9 epochs",
        LIGHTGCN,
        "sparsity=0.8",
        qr(LIGHTGCN_TRAINING, 9, scope="joint"),
    ),
    ("product, 3 epochs", LIGHTGCN, "sparsity=0.8", qr(FAST, 3)),
    ("4 negatives, 3 epochs", ranker(negatives=4), "sparsity=0.8", qr(FAST, 3)),
    ("3 layers, 3 epochs", ranker(layers=3), "sparsity=0.8", qr(FAST, 3)),
    ("6 layers, 3 epochs", ranker(layers=6), "sparsity=0.8", qr(FAST, 3)),
    ("large quotient table, 3 epochs", LIGHTGCN, "sparsity=0.8", qr(FAST, 3, large="quotient")),
)


def tried(backbone: Backbone, budget: str, method: Method, data: Dataset, run: Run) -> str:
    """The figures of a trial, as cells."""
    model = backbone.build(data, run.seed)
    found = ["–", "–", "–"]
    if isinstance(method, PEP):
        net, table = method.searched(*initial_model(model, data, run, method.start), data, run)
        alive = table.alive()
        found[:2] = f"{table.threshold.detach().sigmoid().median():.3f}", f"{alive[-1] / alive[0]:.3f}"
        if method.retrain.values == "found":
            found[2] = f"{validate(net, data.valid):.4f}"
    trained = validate(compress(model, data, method, budget, run=run).model, data.valid)
    return " | ".join([*found, f"{trained:.4f}"])


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = ranking_data("gowalla")
    lines = [
        "| model | method | budget | tried | threshold | alive | searched | trained |",
        "|---|---|---|---|" + "---:|" * 4,
    ]
    with Run(None, seed=0, threads=1, store=options.store) as run:
        for words, backbone, budget, (method, training) in TRIALS:
            figures = tried(backbone, budget, method, data, run.with_training(training))
            lines.append(f"| {backbone.name} | {method.name} | {budget} | {words} | {figures} |")
            print(lines[-1], flush=True)
    text = (__doc__ or "").split("\n")[0]
    (RESULTS / "ranking_trials.md").write_text(f"# Trials on Gowalla\n\n{text}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
