"""The one place where scripts that need trained models take their data sets and settings from.

Data lie in the folder that ``POCKETREC_DATA`` names; encoded data and trained models go to ``cache/`` beside ``bench/``
(not in version control), so that no study encodes or trains what another one has.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.data.dataset import Dataset
from pocketrec.data.encode import encode
from pocketrec.models.backbone import Model
from pocketrec.sources.interactions import Interactions
from pocketrec.sources.table import Table
from pocketrec.training.loop import Training
from pocketrec.training.run import Run
from pocketrec.training.train import train

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent.parent / "cache"

ML_1M = DeepFM(dim=16, hidden=(128, 128, 128), dropout=0.2)
ML_1M_TRAINING = Training(epochs=15, batch_size=2048, learning_rate=1e-3, weight_decay=3e-6, patience=1)

LIGHTGCN = LightGCN(layers=4, regularisation=5e-3, contrast=0.8, temperature=0.2)
LIGHTGCN_TRAINING = Training(epochs=11, learning_rate=1.2e-2, weight_decay=0.0, precision="bf16", patience=11)
LIGHTGCN_COOLING = replace(LIGHTGCN_TRAINING, epochs=8, learning_rate=4e-3)


def raw(*parts: str) -> Path:
    """A file of the data folder."""
    return Path(os.environ["POCKETREC_DATA"]).joinpath(*parts)


def peak_mib() -> float:
    """Peak resident MiB of this process since it was started (``ru_maxrss`` would count its parent's too)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def use_cache() -> None:
    """Keep and find trained models in ``cache/models``."""
    folder = CACHE / "models"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["POCKETREC_CACHE"] = str(folder)


def ml_1m(seed: int) -> Dataset:
    """MovieLens-1M as click data: all ratings, label ``rating >= 4``, split 8:1:1 by ``seed``."""
    source = Table(label="label", drop=("rating",), dense=("user_id", "item_id", "age", "occupation"))
    (CACHE / "data").mkdir(parents=True, exist_ok=True)
    return encode(source, raw("ml-1m-ctr", "ratings.parquet"), CACHE / "data" / f"ml-1m-{seed}", seed=seed)


def ranking_data(name: str) -> Dataset:
    """``gowalla`` or ``yelp2018``: the published test split; ``max(1, floor(n_u / 10))`` pairs a user validate."""
    (CACHE / "data").mkdir(parents=True, exist_ok=True)
    return encode(Interactions(), raw(name, "train.parquet"), CACHE / "data" / name, test=raw(name, "test.parquet"))


def lightgcn(name: str, seed: int) -> tuple[Model, Run]:
    """LightGCN on ``gowalla`` or ``yelp2018``: trained, then cooled at a lower rate; and its run, open."""
    run = Run(CACHE / "runs" / f"lightgcn-{name}-seed-{seed}", seed=seed, threads=1)
    data = ranking_data(name)
    return run.fit("cool", train(LIGHTGCN, data, run, LIGHTGCN_TRAINING), data, LIGHTGCN_COOLING), run
