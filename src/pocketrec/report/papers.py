"""Figures of the papers, shipped as csv files, and which of them belong beside ours."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pocketrec.report.formats import sparsity
from pocketrec.report.records import ORIGINAL, Pairing, Place, Study

FOLDER = Path(__file__).parent / "published"
TABLES = {
    "table5_ctr.csv": ("Table 5", {"auc": "auc", "logloss": "logloss"}),
    "table6_cf.csv": ("Table 6", {"ndcg20": "ndcg@20", "recall20": "recall_capped@20"}),
}
"""By file: its name in the benchmark's paper, and its columns by our metric; the paper's recall is the capped one."""

ALSO = {("table6_cf.csv", "optembed"): "optembedd"}
"""What else a method of a table may be called: for ranking the paper's OptEmbed is the one without a row mask."""
PUBLISHED = frozenset(metric for _, columns in TABLES.values() for metric in columns.values())
"""Our metrics that have a published counterpart."""


@dataclass(frozen=True)
class PublishedRow:
    """One row of a paper: its table, its figures by our metrics, its count of values."""

    table: str
    figures: Mapping[str, float]
    values: float


PaperKey = tuple[str, str, str, str]
"""Data set, backbone, method and sparsity in percent, each as plain letters and digits."""


@cache
def published() -> Mapping[PaperKey, PublishedRow]:
    """Every row of the papers' result tables.

    Example:
        >>> published()["gowalla", "lightgcn", "original", "0"].figures["ndcg@20"]
        0.147

    Reference:
        Tran et al., "A thorough performance benchmarking on lightweight embedding-based recommender systems", 2024,
        Tables 5 and 6.
    """
    found = {}
    for name, (table, columns) in TABLES.items():
        for row in paper_rows(name):
            method = folded_name(row["method"])
            figures = {metric: float(row[column]) for column, metric in columns.items()}
            for called in {method, ALSO.get((name, method), method)}:
                key = (folded_name(row["dataset"]), folded_name(row["backbone"]), called, row["sparsity"])
                found[key] = PublishedRow(table, figures, float(row["params"]))
    return found


@cache
def transfer() -> Mapping[tuple[str, str], Mapping[str, float | None]]:
    """Table 7: retained shares by (sparsity in percent, method), columns as in the file; ``None`` is not available."""
    return {
        (row["sparsity"], folded_name(row["method"])): {
            name: float(value) if value else None for name, value in row.items() if name not in ("sparsity", "method")
        }
        for row in paper_rows("table7_transfer.csv")
    }


def lightgcn(study: Study, pair: Pairing) -> str | None:
    """What LightGCN's authors report, for a pair that is theirs."""
    if "lightgcn" not in _names(study, "backbones", pair.backbone):
        return None
    found = [r for r in paper_rows("lightgcn_reference.csv") if r["dataset"] == folded_name(pair.data)]
    told = "; ".join(f"{float(r['ndcg20']):.4f} and {float(r['recall20']):.4f} (L = {r['layers']})" for r in found)
    return f"LightGCN's authors report NDCG@20 and uncapped recall@20 on {pair.data}: {told}." if found else None


def paper_rows(name: str) -> list[dict[str, str]]:
    """A shipped table."""
    with (FOLDER / name).open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def beside(study: Study, place: Place) -> PublishedRow | None:
    """The published row of the same data set, backbone, method and sparsity, by labels or plug-ins of the plan."""
    asked = "0" if place.method == ORIGINAL else _percent(place.budget)
    if asked is None:
        return None
    backbone = _names(study, "backbones", place.pair.backbone)
    method = [ORIGINAL] if place.method == ORIGINAL else _names(study, "methods", place.method)
    keys = [(data_set(place.pair.data), b, m, asked) for b in backbone for m in method]
    return next((published()[key] for key in keys if key in published()), None)


def data_set(label: str) -> str:
    """The published data set that a label speaks of: its name, or its name and the size of a sample.

    Example:
        >>> data_set("criteo-80k"), data_set("gowalla"), data_set("gowallaby")
        ('criteo', 'gowalla', 'gowallaby')
    """
    known = {key[0] for key in published()}
    match = re.fullmatch(r"([a-z]+(?:20\d\d|12)?)[^a-z]*\d*[km]?", label.lower())
    return match[1] if match and match[1] in known else folded_name(label)


def is_sample(label: str) -> bool:
    """Whether a label speaks of a part of a published data set only."""
    return folded_name(label) != data_set(label)


def folded_name(name: str) -> str:
    """Letters and digits of a name, small: ``mag_prune`` and ``MagPrune`` are one.

    Example:
        >>> folded_name("DCN-Mix"), folded_name("dcn_mix")
        ('dcnmix', 'dcnmix')
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _names(study: Study, axis: str, label: str) -> list[str]:
    """What a label may be called in a paper: itself, or its plug-in."""
    entry = study.plan.get(axis, {}).get(label, {})
    return [folded_name(label), folded_name(str(entry.get("plugin", label)))]


def _percent(budget: str) -> str | None:
    asked = sparsity(budget)
    return None if asked is None else f"{100 * asked:.6g}"
