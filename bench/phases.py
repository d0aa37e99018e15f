"""Time and memory of every phase: DeepFM on MovieLens-1M and LightGCN on Gowalla, uncompressed and at 80 % sparsity.

    POCKETREC_DATA=... python bench/phases.py

Each phase runs in a fresh process by :func:`pocketrec.study.efficiency.profile`, as in Figures 3 and 4 of the published
study, on both profiles. The models are trained for an epoch or two only: no time depends on more. An epoch of LightGCN
is extrapolated from a few steps on both profiles. Writes ``bench/results/phases.md`` and ``.csv``.
"""

from __future__ import annotations

import csv
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from configs import CACHE, LIGHTGCN, LIGHTGCN_TRAINING, ML_1M, ML_1M_TRAINING, RESULTS, ml_1m, ranking_data

from pocketrec.backbone import Backbone
from pocketrec.dataset import Dataset
from pocketrec.method import Method
from pocketrec.methods import MagPrune, Shaver
from pocketrec.study.efficiency import machine, profile
from pocketrec.train import Training

PARTS = ("packages", "vocabulary", "model", "runtime", "total")
METHODS: dict[str, Method | None] = {"original": None, "magnitude": MagPrune(), "shaver": Shaver()}


@dataclass(frozen=True)
class Case:
    """One data set with its model; ``shares`` of an epoch that are timed on the server and on the edge."""

    name: str
    data: Dataset
    backbone: Backbone
    training: Training
    shares: tuple[float | None, float | None]


def cases() -> list[Case]:
    """Both pairs."""
    clicks, visits = replace(ML_1M_TRAINING, epochs=2), replace(LIGHTGCN_TRAINING, epochs=1)
    return [
        Case("ML-1M, DeepFM", ml_1m(0), ML_1M, clicks, (None, None)),
        Case("Gowalla, LightGCN", ranking_data("gowalla"), LIGHTGCN, visits, (0.05, 0.002)),
    ]


def measure(case: Case) -> list[dict[str, Any]]:
    """All phases of a case."""
    rows = []
    for name, share in zip(("server", "edge"), case.shares, strict=True):
        for label, method in METHODS.items():
            found = profile(
                case.backbone, method, case.data, training=case.training, profile=name, share=share,
                store=CACHE / "phases",
            )  # type: ignore[arg-type]  # fmt: skip
            rows += [{"case": case.name, "method": label, **record} for record in found]
            print(time.strftime("%H:%M:%S"), case.name, name, label, len(found), "phases", flush=True)
    return rows


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    plain = {n: record[n] for n in ("case", "method", "profile", "phase", "threads")}
    batch = {"batch": "all rows" if record["batch"] is None else record["batch"]}
    ms = {f"{n}_ms": record["ms"][n] for n in ("p50", "p10", "p90")}
    memory = {f"{part}_mib": record["peak_mib"][part] for part in PARTS}
    return {
        **plain,
        **batch,
        **ms,
        "repeats": record["ms"]["repeats"],
        "extrapolated": record["extrapolated"],
        **memory,
    }


def shown(milliseconds: float) -> str:
    """Three digits, in the unit that suits."""
    for unit, factor in (("min", 6e4), ("s", 1e3), ("ms", 1.0)):
        if milliseconds >= factor:
            return f"{milliseconds / factor:.3g} {unit}"
    return f"{milliseconds * 1e3:.3g} us"


def write(rows: list[dict[str, Any]], load: float, seconds: float) -> None:
    """``bench/results/phases.csv`` and ``.md``."""
    with (RESULTS / "phases.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Time and memory of every phase", "",
        f"`python bench/phases.py`, {seconds:.0f} s; {about['cpu']}, {about['usable_cores']} cores, {about['system']}, "
        f"kernel {about['kernel']}; {versions}. One thread. Load average before: {load:.1f} (other processes were at "
        "work: times are upper bounds, memory is not affected).", "",
        "Sparsity 80 % where there is a method. Each phase is a process of its own; memory is resident MiB, its parts "
        "sum to the peak: packages (interpreter, libraries), vocabulary, model, run time. `*`: extrapolated from part "
        "of an epoch, or from one epoch to all that were run.", "",
    ]  # fmt: skip
    for case in dict.fromkeys(row["case"] for row in rows):
        for name in ("server", "edge"):
            head = "method | phase | batch | median | 10 % to 90 % | packages | vocabulary | model | run time | peak"
            lines += [f"## {case}, {name}", "", f"| {head} |", "|" + "---|" * 10]
            lines += [line(r) for r in rows if (r["case"], r["profile"]) == (case, name)] + [""]
    (RESULTS / "phases.md").write_text("\n".join(lines))


def line(row: dict[str, Any]) -> str:
    """One row of a table."""
    span = f"{shown(row['p10_ms'])} to {shown(row['p90_ms'])}" if row["repeats"] > 1 else "once"
    mark = " *" if row["extrapolated"] else ""
    memory = " | ".join(f"{row[f'{part}_mib']:.1f}" for part in PARTS)
    return f"| {row['method']} | {row['phase']} | {row['batch']} | {shown(row['p50_ms'])}{mark} | {span} | {memory} |"


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    started, load = time.monotonic(), os.getloadavg()[0]
    rows = [flat(record) for case in cases() for record in measure(case)]
    write(rows, load, time.monotonic() - started)


if __name__ == "__main__":
    main()
