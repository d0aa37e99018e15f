"""A study's folder in, its report out: csv and markdown tables, pictures, evidence, and one page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketrec.files import atomic_write
from pocketrec.report import figures
from pocketrec.report.chart import poster
from pocketrec.report.compare import REPLICATES
from pocketrec.report.evidence_file import NAME, content, known_evidence
from pocketrec.report.records import Study
from pocketrec.report.tables.every import sheets


@dataclass(frozen=True)
class ReportFiles:
    """What was written.

    Attributes:
        page: the html page.
        tables: csv and markdown files.
        pictures: quality against size, an svg for each data set and backbone.
        counts: planned cells that are ``done``, ``failed`` and ``missing``.
    """

    page: Path
    tables: tuple[Path, ...]
    pictures: tuple[Path, ...]
    counts: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The document of ``pocketrec report --json``."""
        return {
            "report": str(self.page),
            "tables": [str(path) for path in self.tables],
            "pictures": [str(path) for path in self.pictures],
            "cells": self.counts["done"],
            "failed": self.counts["failed"],
            "missing": self.counts["missing"],
        }


def write(folder: str | Path, *, replicates: int = REPLICATES, seed: int = 0) -> ReportFiles:
    """Write ``FOLDER/report`` from the records in ``FOLDER``; the same records give the same bytes.

    Where predictions are gone, what they came to is taken from ``FOLDER/evidence.json`` or that of its report, if it is
    of the same records and draws.

    Args:
        folder: of a study, finished or not: what is missing is shown as such.
        replicates: draws of the bootstrap, at least 100; evidence cannot be finer than 2 in that many.
        seed: of the draws.

    Raises:
        DataError: the folder has no study.
        ArtifactError: a record, a file of predictions or of evidence is damaged.
    """
    from pocketrec.report.page import page

    study = Study.read(folder)
    known = known_evidence(study, replicates=replicates, seed=seed)
    made = sheets(study, known)
    out = study.folder / "report"
    out.mkdir(exist_ok=True)
    tables = []
    for sheet in made:
        for suffix, text in (("csv", sheet.csv()), ("md", sheet.markdown())):
            tables.append(out / f"{sheet.slug}.{suffix}")
            atomic_write(tables[-1], text.encode())
    pictures = []
    names = [(None, "uncompressed"), *((figures.style(study, m), m) for m in study.methods)]
    for pair in study.pairs:
        if drawn := figures.frontiers(study, pair):
            pictures.append(out / f"frontier-{pair.data}-{pair.backbone}.svg")
            made_of = [(d.title, d.svg) for d in drawn]
            atomic_write(pictures[-1], poster(f"{study.plan['name']}: {pair}", names, made_of).encode())
    if (kept := content(study, known, replicates=replicates, seed=seed)) is not None:
        atomic_write(out / NAME, kept)
    target = out / "index.html"
    atomic_write(target, page(study, known, made).encode())
    return ReportFiles(target, tuple(tables), tuple(pictures), study.count())
