"""One training, one pass over the rows, a ladder of files for every class of device."""

from __future__ import annotations

import pocketrec as pr

BUDGETS = ["2 MiB", "512 KiB", "sparsity=0.95"]

if __name__ == "__main__":
    data = pr.encode(pr.sources.Synthetic(), None, "data/clicks")
    model = pr.train(pr.backbones.DeepFM(hidden=(64, 64)), data, "runs/base")
    for small in pr.compress(model, data, pr.methods.RateDistortion(), BUDGETS, run="runs/small"):
        path = f"clicks-{small.sizes['file']}.safetensors"
        small.save(path)
        quality = pr.measure(path, data.test).quality
        print(f"{path}: {small.values:,} values, AUC {quality['auc']:.4f}")
