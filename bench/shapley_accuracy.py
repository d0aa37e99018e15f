"""Owen gradients against permutation walks on a trained model: MovieLens-1M, DeepFM, the same training samples.

    POCKETREC_DATA=... python bench/shapley_accuracy.py

The reference is the mean of antithetic pairs of permutation walks; a second, independent reference of the same cost
shows its own noise. Entries that no sample reads are left out.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import get_args

import configs
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from pocketrec.attribution.estimators import Estimator, LevelSampling, Owen, Permutation
from pocketrec.attribution.games import ClickGame
from pocketrec.attribution.lowered import LoweredHead
from pocketrec.attribution.samples import ClickSamples
from pocketrec.attribution.scores import Scores, attribute
from pocketrec.families.pruning import fill_rows
from pocketrec.training.train import train

SPARSITIES = (0.5, 0.8, 0.95)


def overlap(one: NDArray[np.float32], other: NDArray[np.float32], sparsity: float) -> float:
    """Share of the kept entries that two rankings have in common."""
    count = len(one) - int(len(one) * sparsity)
    kept = [set(np.argsort(-x, kind="stable")[:count].tolist()) for x in (one, other)]
    return len(kept[0] & kept[1]) / count


def main() -> None:
    """Score and write bench/results/shapley_accuracy.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--walks", type=int, default=32, help="antithetic pairs of walks of the reference")
    args = parser.parse_args()
    torch.set_num_threads(1)
    configs.use_cache()
    data = configs.ml_1m(0)
    model = train(configs.ML_1M, data, None, configs.ML_1M_TRAINING)
    weight = model.table.weight().detach()
    fill = torch.from_numpy(fill_rows("codebook", weight.numpy(), data.schema, data.counts))
    game = ClickGame(LoweredHead.of(model.lower()))
    samples = ClickSamples(data.train, args.samples, 0)

    def score(estimator: Estimator, seed: int) -> tuple[Scores, float]:
        started = time.thread_time()
        scores = attribute(game, weight, fill, samples, estimator, seed=seed)
        return scores, time.thread_time() - started

    reference, _ = score(Permutation(args.walks), 1)
    variants: dict[str, tuple[Estimator, int]] = {
        f"permutation, {args.walks} antithetic pairs, another seed": (Permutation(args.walks), 2),
        "permutation, 1 walk": (Permutation(1, antithetic=False), 3),
        **{
            f"owen, {levels}, {pairs} pairs": (Owen(pairs, levels), 4)
            for levels in get_args(LevelSampling)
            for pairs in (1, 4, 16)
        },
    }
    seen = reference.square.any(axis=1)
    truth = reference.mean[seen].ravel()
    rows = []
    for name, (estimator, seed) in variants.items():
        scores, seconds = score(estimator, seed)
        found = scores.mean[seen].ravel()
        kept = [overlap(np.abs(found), np.abs(truth), s) for s in SPARSITIES]
        pearson, spearman = np.corrcoef(found, truth)[0, 1], spearmanr(found, truth)[0]
        rows.append((name, pearson, spearman, *kept, scores.gap, seconds))
    results = Path(__file__).parent / "results"
    lines = [
        "# Owen gradients against permutation walks",
        "",
        f"`python bench/shapley_accuracy.py`: MovieLens-1M, DeepFM {configs.ML_1M.hidden}, codebook game, "
        f"{args.samples:,} training samples, {len(truth):,} entries;",
        f"reference: {args.walks} antithetic pairs of walks per sample.",
        "",
        "| estimator | Pearson | Spearman | overlap 50 % | 80 % | 95 % | efficiency gap | CPU s |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {p:.4f} | {r:.4f} | {a:.3f} | {b:.3f} | {c:.3f} | {gap:+.4f} | {s:.1f} |"
            for name, p, r, a, b, c, gap, s in rows
        ),
        "",
    ]
    (results / "shapley_accuracy.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
