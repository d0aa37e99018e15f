"""The main job on the embedded default: a click log with a known teacher, one training, a ladder of budgets.

Synthetic log -> encode -> train DeepFM -> one scoring pass -> five budgets for each of four methods -> one file each
-> each measured from its file -> a table and a picture. Everything lies in one folder; run again, it goes on where it
was.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pocketrec import registry
from pocketrec.command import shown
from pocketrec.command.picture import Chart, MeasuredFile, page, png, size, summary
from pocketrec.compression.compress import compress
from pocketrec.compression.ladder import Method
from pocketrec.compression.measure import measure
from pocketrec.data.dataset import Dataset
from pocketrec.data.encode import encode
from pocketrec.errors import BudgetError, DataError
from pocketrec.evaluation.metrics import auc
from pocketrec.files import atomic_write
from pocketrec.training.loop import Training
from pocketrec.training.run import Run
from pocketrec.training.train import train

if TYPE_CHECKING:
    from pocketrec.models.backbone import Model

BUDGETS = ("50%", "20%", "10%", "5%", "1%")
METHODS = ("rate_distortion", "shaver", "mag_prune", "frequency_distance")
CARDINALITIES = (10_000, 10_000, 6_000, 6_000, 3_000, 2_000, 1_000, 500)
ROWS = 1_000_000


class ProgressWatch(Protocol):
    """Told how far the work is; see :class:`pocketrec.command.progress.Watcher`."""

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """``done`` of ``total`` units of ``stage``."""
        ...

    def rows(self, stage: str, done: int) -> None:
        """``done`` rows of ``stage``."""
        ...


@dataclass(frozen=True)
class DemoResult:
    """What came out, and where it lies.

    Attributes:
        out: the folder.
        chart: every point of the picture.
    """

    out: Path
    chart: Chart

    def to_json(self) -> dict[str, Any]:
        """The document of ``pocketrec demo --json``."""
        return {
            "out": str(self.out),
            "picture": str(self.out / "demo.png"),
            "page": str(self.out / "demo.html"),
            "teacher_auc": self.chart.ceiling,
            "dense": asdict(self.chart.dense),
            "curves": {name: [asdict(point) for point in points] for name, points in self.chart.curves.items()},
        }

    def to_text(self) -> str:
        """The table, one line for each file."""
        dense = self.chart.dense
        rows = [("teacher (ceiling)", "", "", "", "", f"{self.chart.ceiling:.4f}", ""), _row("dense", dense, dense)]
        rows += [_row(name, point, dense) for name, points in self.chart.curves.items() for point in points]
        header = ("method", "budget", "table", "file", "values", "AUC", "against dense")
        places = f"picture: {self.out / 'demo.png'}\npage:    {self.out / 'demo.html'}"
        return f"{shown.table(header, rows)}\n\n{self.chart.title}\n{places}"


def run(out: Path, *, seed: int, threads: int | None, watcher: ProgressWatch, rows: int = ROWS) -> DemoResult:
    """Do the whole job in the folder ``out``.

    Args:
        out: folder of data set, run, artifacts, table and picture.
        seed: of log, training, scoring.
        threads: threads of torch and of the kernel; ``None``: as they are.
        watcher: told how far the work is.
        rows: rows of the log.

    Raises:
        RunLocked: another demo works in the folder.
    """
    source = registry.load("sources", "synthetic")(
        rows=rows, cardinalities=CARDINALITIES, exponent=0.9, interaction=0.2, generator_seed=seed
    )
    data = encode(source, None, out / "data", seed=seed, progress=watcher.rows)
    backbone = registry.load("backbones", "deepfm")(dim=16, hidden=(64, 64))
    with Run(out / "run", seed=seed, threads=threads, progress=watcher) as run:
        model = train(backbone, data, run, Training(epochs=2, weight_decay=1e-5))
        dense = _dense(model, data, run)
        methods = [registry.load("methods", name)() for name in METHODS]
        curves = {type(m).__name__: _ladder(m, model, data, run, out / "artifacts") for m in methods}
    report = DemoResult(out, _chart(data, dense, curves, out, seed))
    atomic_write(out / "demo.png", png(report.chart))
    atomic_write(out / "demo.html", page(report.chart).encode())
    return report


def _dense(model: Model, data: Dataset, run: Run) -> MeasuredFile:
    measured = measure(model, data.test, ledger=run.ledger, latency=False)
    values = sum(b.values for b in model.table.blocks if b.counted)
    return MeasuredFile("100%", measured.bytes["table"], measured.bytes["file"], values, measured.quality["auc"])


def _ladder(method: Method, model: Model, data: Dataset, run: Run, folder: Path) -> tuple[MeasuredFile, ...]:
    """One file for each budget within reach, each measured from the file alone."""
    folder.mkdir(exist_ok=True)
    points = []
    for i, budget in enumerate(BUDGETS):
        run.progress(type(method).__name__, i, len(BUDGETS), {})
        points.append(_point(method, budget, model, data, run, folder))
    run.progress(type(method).__name__, len(BUDGETS), len(BUDGETS), {})
    return tuple(points)


def _point(method: Method, budget: str, model: Model, data: Dataset, run: Run, folder: Path) -> MeasuredFile:
    try:
        small = compress(model, data, method, budget, run=run)
    except BudgetError as error:
        least = f"at least {size(error.least_bytes)}" if error.least_bytes else ""
        return MeasuredFile(budget, 0, 0, 0, None, note=f"out of reach {least}".strip())
    path = folder / f"{method.name}-{budget.replace('%', 'pct')}.safetensors"
    small.save(path)
    measured = measure(path, data.test, ledger=run.ledger, latency=False)
    return MeasuredFile(budget, measured.bytes["table"], measured.bytes["file"], small.values, measured.quality["auc"])


def _chart(
    data: Dataset, dense: MeasuredFile, curves: dict[str, tuple[MeasuredFile, ...]], out: Path, seed: int
) -> Chart:
    labels, teacher = data.test.labels, data.test.teacher
    ceiling = auc(labels, teacher) if labels is not None and teacher is not None else None
    if ceiling is None:
        raise DataError("The demo needs a test split with a teacher and with both labels; use more rows.")
    rows = sum(len(split) for split in data.splits.values())
    return Chart(
        title=summary(next(iter(curves.values())), dense),
        subtitle=f"Synthetic click log of {rows:,} rows; DeepFM; every point is one file, measured from the file",
        curves=curves,
        dense=dense,
        ceiling=ceiling,
        command=f"pocketrec demo --seed {seed} --out {shlex.quote(out.name)}",
    )


def _row(name: str, point: MeasuredFile, dense: MeasuredFile) -> tuple[str, ...]:
    if point.auc is None or dense.auc is None:
        return (name, point.budget, point.note, "", "", "", "")
    lost = "" if point is dense else f"{point.auc - dense.auc:+.4f}"
    return (
        name,
        point.budget,
        size(point.table_bytes),
        size(point.file_bytes),
        f"{point.values:,}",
        f"{point.auc:.4f}",
        lost,
    )
