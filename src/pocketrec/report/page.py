"""One self-contained page: no script, no network, no font but the reader's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pocketrec.report import figures, formats
from pocketrec.report.chart import PARTS as PART_COLORS
from pocketrec.report.chart import swatch
from pocketrec.report.compare import Evidence
from pocketrec.report.figures import TitledFigure
from pocketrec.report.records import METRICS, JournalRecord, Pairing, Place, Study
from pocketrec.report.sheet import Sheet
from pocketrec.report.tables.cost import PARTS
from pocketrec.report.tables.place import budgets
from pocketrec.report.tables.provenance import flat, searched_names

TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class LegendEntry:
    """An entry of a legend."""

    swatch: str
    name: str


@dataclass(frozen=True)
class Hyperparameters:
    """Hyper-parameters of one method on one pair.

    Attributes:
        pair: data set and backbone.
        budgets: columns.
        varied: rows of settings that were searched, or differ: name, whether it was searched, a value for each budget.
        fixed: all other settings.
    """

    pair: str
    budgets: tuple[str, ...]
    varied: tuple[tuple[str, bool, tuple[str, ...]], ...]
    fixed: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class MethodSection:
    """All on one method."""

    name: str
    swatch: str
    plugin: str
    settings: tuple[Hyperparameters, ...]
    searches: tuple[TitledFigure, ...]
    seconds: tuple[tuple[str, str], ...]


def page(study: Study, known: Mapping[Pairing, Mapping[str, Evidence]], sheets: Sequence[Sheet]) -> str:
    """The page as one string."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["svg"] = Markup
    by_slug = {sheet.slug: sheet for sheet in sheets}
    return environment.get_template(TEMPLATE).render(
        study=study,
        counts=study.count(),
        facts=facts(study),
        sheets=by_slug,
        quality=[s for s in sheets if s.slug.startswith("quality-")],
        published=[s for s in sheets if s.slug.startswith("published-")],
        legend=[LegendEntry(swatch(None), "uncompressed"), *legend(study)],
        pairs=[(str(p), figures.frontiers(study, p)) for p in study.pairs],
        curves=[(str(p), drawn) for p in study.pairs if (drawn := figures.curves(study, p))],
        costs=figures.costs(study),
        parts=list(zip(PARTS, PART_COLORS, strict=True)),
        magnitudes=figures.magnitudes(study),
        methods=[section(study, method) for method in ("original", *study.methods)],
        checked=checked(study, known),
    )


def legend(study: Study) -> list[LegendEntry]:
    """Marks and names of the methods."""
    return [LegendEntry(swatch(figures.style(study, m)), m) for m in study.methods]


def facts(study: Study) -> list[tuple[str, str]]:
    """What the study is, in a few lines."""
    machine = study.machine
    versions = machine.get("versions", {})
    told = [
        ("data sets", ", ".join(dict.fromkeys(pair.data for pair in study.pairs))),
        ("backbones", ", ".join(dict.fromkeys(pair.backbone for pair in study.pairs))),
        ("methods", ", ".join(study.methods)),
        ("budgets", ", ".join(formats.budget(b) for b in budgets(study))),
        ("seeds", ", ".join(str(s) for s in dict.fromkeys(s for by in study.planned.values() for s in by))),
        ("trials of a search", formats.plain(study.plan.get("trials"))),
        ("processor", f"{machine['cpu']}, {formats.plain(machine.get('cores'))} cores" if machine.get("cpu") else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))),
    ]
    return [(name, text) for name, text in told if text and text != "–"]


def section(study: Study, method: str) -> MethodSection:
    """Settings found, searches and times of a method; of the uncompressed model for ``original``."""
    plugin = "" if method == "original" else str(study.plan["methods"].get(method, {}).get("plugin", method))
    style = None if method == "original" else figures.style(study, method)
    found = [s for pair in study.pairs if (s := _settings(study, pair, method)) is not None]
    return MethodSection(
        method,
        swatch(style),
        plugin if plugin != method else "",
        tuple(found),
        tuple(figures.search(study, method)),
        tuple(_seconds(study, method)),
    )


def _settings(study: Study, pair: Pairing, method: str) -> Hyperparameters | None:
    """Settings of the first seed of each budget."""
    records: dict[Place, JournalRecord] = {}
    for place in study.places(pair):
        if place.method == method and (by_seed := study.cells.get(place)):
            records[place] = by_seed[min(by_seed)]
    if not records:
        return None
    columns = {place: flat(r.get("params") or {}) for place, r in records.items()}
    searched = {name for place in records for name in searched_names(study, place)}
    varied, fixed = [], []
    for name in dict.fromkeys(n for column in columns.values() for n in column):
        texts = tuple(formats.plain(column.get(name, "")) for column in columns.values())
        if name in searched or len(set(texts)) > 1:
            varied.append((name, name in searched, texts))
        else:
            fixed.append((name, texts[0]))
    return Hyperparameters(str(pair), tuple(formats.budget(p.budget) for p in records), tuple(varied), tuple(fixed))


def _seconds(study: Study, method: str) -> list[tuple[str, str]]:
    """Mean time of a cell by pair: training, compression, measuring."""
    found = []
    for pair in study.pairs:
        places = [p for p in study.places(pair) if p.method == method]
        words = []
        for part in ("train", "compress", "measure"):
            means = [m for p in places if (m := study.mean(p, "seconds", part))]
            if means:
                words.append(f"{part} {formats.milliseconds(1000 * float(np.mean(means)))}")
        if words:
            found.append((str(pair), ", ".join(words)))
    return found


def checked(study: Study, known: Mapping[Pairing, Mapping[str, Evidence]]) -> tuple[int, float]:
    """How many means were computed again from stored predictions, and by how much the worst one differs."""
    gaps = [
        abs(interval.estimate - float(np.mean(list(study.values(place, metric.name).values()))))
        for pair, by_metric in known.items()
        for metric in METRICS[study.task(pair) or "ctr"]
        if not (found := by_metric.get(metric.name, Evidence(metric))).from_file
        for place, interval in found.intervals.items()
    ]
    return len(gaps), max(gaps, default=0.0)
