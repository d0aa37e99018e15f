"""What each part of rate-distortion coding buys: MovieLens-1M, DeepFM 128x3, validation, three seeds.

    POCKETREC_DATA=... python bench/rate_distortion_ablation.py --store cache/models

Every variant leaves one part out, and codes the same dense models (those of the plan ``bytes``, trained where the store
has none) into the same table bytes. The head is judged apart, by the whole file: how many bytes reach the AUC that a
table of the share has beside a head in float32.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from pocketrec.attribution.fisher import Sensitivity
from pocketrec.compression.compress import compress
from pocketrec.compression.small import Small
from pocketrec.data.dataset import Dataset
from pocketrec.families.coding.clicks import allocation
from pocketrec.format import quantiser, sections
from pocketrec.methods import rate_distortion
from pocketrec.methods.rate_distortion import RateDistortion
from pocketrec.models.backbone import Model
from pocketrec.study.cells import dense
from pocketrec.study.jobs import Job
from pocketrec.study.plan import Plan
from pocketrec.study.runner import prepare
from pocketrec.training.evaluate import validate
from pocketrec.training.run import Run

RESULTS = Path(__file__).parent / "results"
SHARES = ("5%", "2%")
SEEDS = (0, 1, 2)
TOUCH_UP = 2
TOUCHED = "all of it, touched up"
STEPS = 5
"""Halvings of the interval in which the smallest file as good is looked for."""

Floats = NDArray[np.floating]
Part = Callable[[Dataset], AbstractContextManager[Any]]


def axes(choose: Callable[[Floats, Floats, Floats], NDArray[np.float64]]) -> Part:
    """Another choice of directions, from residuals, weights of rows and metric."""
    return lambda data: patch.object(allocation, "principal_axes", choose)


def turned(residuals: Floats, weight: Floats, metric: Floats) -> NDArray[np.float64]:
    """Principal axes of the residuals themselves, the metric left out."""
    _, vectors = np.linalg.eigh((residuals * weight[:, None]).T @ residuals)
    return vectors[:, ::-1].astype(np.float64)


def untouched(residuals: Floats, weight: Floats, metric: Floats) -> NDArray[np.float64]:
    """The coordinates as they are."""
    return np.eye(len(metric))


def one_class(data: Dataset) -> AbstractContextManager[Any]:
    """A row has the bits of its field, or none."""
    return patch.object(allocation, "MOST_CLASSES", 1)


def by_counts(data: Dataset) -> AbstractContextManager[Any]:
    """Rows weigh as often as they occur, errors of all coordinates alike: no gradient is read."""
    counts = np.asarray(data.counts, np.float32)

    def sensitivity(model: Model, dataset: Dataset, **_: Any) -> Sensitivity:
        width, fields = model.table.width, data.schema.width
        metric = np.stack([np.eye(width, dtype=np.float32)] * fields)
        total = np.array([counts[f.offset : f.stop].sum() for f in data.schema.fields])
        return Sensitivity(metric * (total / width)[:, None, None].astype(np.float32), counts)

    return patch.object(rate_distortion, "sensitivity", sensitivity)


@contextmanager
def even_levels(data: Dataset) -> Iterator[None]:
    """Levels at even steps, of the best step for a normal variable."""

    @cache
    def levels(bits: int) -> NDArray[np.float32]:
        steps = np.arange(1 << bits) - ((1 << bits) - 1) / 2
        x = np.linspace(-9, 9, 1 << 13)
        share = np.exp(-x * x / 2)

        def error(size: float) -> float:
            return float((share * (x - size * np.clip(np.rint(x / size - 0.5) + 0.5, steps[0], steps[-1])) ** 2).sum())

        best = min(np.geomspace(0.01, 4, 800).tolist(), key=error) if bits else 0.0
        return (best * steps).astype(np.float32)

    known = (quantiser.edges, quantiser.level_table)
    with ExitStack() as stack:
        for module in (quantiser, sections, allocation):
            stack.enter_context(patch.object(module, "levels", levels))
        for function in known:
            function.cache_clear()
        ratios = np.array([allocation.distortion(b) for b in range(quantiser.MOST_BITS + 1)])
        with patch.object(allocation, "_DISTORTION", ratios):
            yield
    for function in known:
        function.cache_clear()


PARTS: dict[str, Part] = {
    "all of it": lambda data: nullcontext(),
    "no whitening by the gradients": axes(turned),
    "no transform": axes(untouched),
    "one class of rows in a field": one_class,
    "training counts instead of Fisher information": by_counts,
    "even levels instead of Lloyd's and Max's": even_levels,
}


def models(store: Path, folder: Path) -> Iterator[tuple[Model, Dataset, Run]]:
    """The dense models of the plan, one for each seed."""
    context = prepare(Plan.read("bytes"), folder, store)
    for seed in SEEDS:
        job = Job("cell", "ml-1m", "deepfm", "rate_distortion", SHARES[0], seed)
        yield dense(context, job, {}), context.data(job), Run(None, seed=seed, threads=1, store=store)


def auc(small: Small) -> float:
    """On validation."""
    found = validate(small.model, small.data.valid)
    return float("nan") if found is None else found


def losses(model: Model, data: Dataset, run: Run) -> Iterator[tuple[str, str, float]]:
    """Part left out, share and AUC lost."""
    own = validate(model, data.valid) or float("nan")
    for name, part in PARTS.items():
        with part(data):
            apart = Run(None, seed=run.seed, threads=1) if part is by_counts else run
            smalls = compress(model, data, RateDistortion(), SHARES, run=apart)
        yield from ((name, share, own - auc(small)) for share, small in zip(SHARES, smalls, strict=True))
    smalls = compress(model, data, RateDistortion(touch_up=TOUCH_UP), SHARES, run=run)
    yield from ((TOUCHED, share, own - auc(small)) for share, small in zip(SHARES, smalls, strict=True))


def files(model: Model, data: Dataset, run: Run) -> Iterator[tuple[str, int, int]]:
    """Share, bytes of its file beside a head in float32, and of the smallest file with a coded head that is as good."""
    for share in SHARES:
        plain = compress(model, data, RateDistortion(code_head=False), share, run=run)
        wanted, high = auc(plain), plain.sizes["file"]
        low = high // 16
        for _ in range(STEPS):
            middle = (low + high) // 2
            coded = compress(model, data, RateDistortion(), f"{middle} B", run=run)
            low, high = (low, middle) if auc(coded) >= wanted else (middle, high)
        yield share, plain.sizes["file"], high


def spread(found: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(found):.5f} ± {np.std(found, ddof=1):.5f}"


def main() -> None:
    """Measure and write bench/results/rate_distortion_ablation.{md,csv}."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="folder of trained models and finished steps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    sizes: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for model, data, run in models(args.store, Path(folder)):
            rows += [{"seed": run.seed, "part": p, "share": s, "auc_lost": v} for p, s, v in losses(model, data, run)]
            sizes += [{"seed": run.seed, "share": s, "float32": a, "coded": b} for s, a, b in files(model, data, run)]
    for name, records in (("", rows), ("_head", sizes)):
        with (RESULTS / f"rate_distortion_ablation{name}.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(records[0]))
            table.writeheader()
            table.writerows(records)
    text = report(rows, sizes)
    (RESULTS / "rate_distortion_ablation.md").write_text(text)
    print(text)


def report(rows: list[dict[str, Any]], sizes: list[dict[str, Any]]) -> str:
    """The tables for people."""

    def lost(part: str, share: str) -> list[float]:
        return [r["auc_lost"] for r in rows if (r["part"], r["share"]) == (part, share)]

    def size(kind: str, share: str) -> float:
        return float(np.mean([r[kind] for r in sizes if r["share"] == share]))

    lines = [
        "# What each part of rate-distortion coding buys",
        "",
        "`python bench/rate_distortion_ablation.py`: MovieLens-1M (all rows), DeepFM 128x3 of width 16, AUC lost on",
        f"validation against the dense model, mean and deviation over {len(SEEDS)} seeds (and splits); all variants of",
        "a column have the same bytes.",
        "",
        f"| | {' | '.join(f'{s} of the table' for s in SHARES)} |",
        f"|---|{'---|' * len(SHARES)}",
        *(f"| {part} | {' | '.join(spread(lost(part, s)) for s in SHARES)} |" for part in (*PARTS, TOUCHED)),
        "",
        "The whole file: bytes with the head in float32, and of the smallest file with a coded head that is as good on",
        "validation.",
        "",
        "| table | float32 head | coded head | times smaller |",
        "|---|---|---|---|",
        *(
            f"| {s} | {size('float32', s):,.0f} | {size('coded', s):,.0f} "
            f"| {size('float32', s) / size('coded', s):.2f} |"
            for s in SHARES
        ),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
