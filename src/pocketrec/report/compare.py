"""Which differences are real: every comparison that the report marks, with its interval and corrected evidence.

Where predictions were kept, figures are bootstrapped over seeds and test rows (users) at once, all models of a pair on
the same draws; else only the seeds speak, by a paired Student interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pocketrec.evaluation import statistics as statisticss
from pocketrec.evaluation.statistics import Bootstrap, Interval, Statistic
from pocketrec.report.records import DENSE, METRICS, ORIGINAL, Metric, Pairing, Place, StoredArrays, Study

REPLICATES = 2000
LEVEL = 0.95
EXACT_ROWS = 20_000
"""Test rows up to which a bootstrapped AUC counts pairs."""

IntervalBasis = Literal["seeds and rows", "rows", "seeds"]
Mark = Literal["best", "second"]


@dataclass(frozen=True)
class Comparison:
    """``name`` against ``other`` at one budget: difference of means over seeds, its interval and evidence.

    Attributes:
        place: of the first one.
        other: of the second one.
        metric: what is compared; a positive difference is always in favour of the first.
        interval: of the difference.
        corrected: evidence after Holm's correction over the comparisons that decide the marks of this budget.
        how: what was resampled: rows of one seed say nothing on other trainings.
    """

    place: Place
    other: Place
    metric: str
    interval: Interval
    corrected: float
    how: IntervalBasis

    @property
    def better(self) -> bool:
        """Whether the first one is better beyond doubt."""
        return self.interval.estimate > 0 and self.corrected <= 1 - LEVEL


@dataclass(frozen=True)
class Evidence:
    """All that is known of one figure of one pair.

    Attributes:
        metric: the figure.
        intervals: of its mean, by place, for places with all seeds.
        against: difference from the original, by place.
        marks: ``best`` and ``second`` by place, only where significant.
        comparisons: behind the marks.
        from_file: whether it was written by an earlier report, whose predictions are gone.
    """

    metric: Metric
    intervals: Mapping[Place, Interval] = field(default_factory=dict)
    against: Mapping[Place, Interval] = field(default_factory=dict)
    marks: Mapping[Place, Mark] = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    from_file: bool = False

    @property
    def how(self) -> list[IntervalBasis]:
        """By what the comparisons were made."""
        return sorted({c.how for c in self.comparisons})

    def no_worse(self, place: Place, original: float) -> bool:
        """Whether a place is shown to lose less than the margin against the original."""
        margin = self.metric.margin * (abs(original) if self.metric.relative else 1.0)
        return place in self.against and self.against[place].no_worse(margin)


def evidence(study: Study, pair: Pairing, *, replicates: int = REPLICATES, seed: int = 0) -> dict[str, Evidence]:
    """Everything that can be said on a pair, by metric.

    Only places with a result for every planned seed take part, each among those of the same seeds: a mean over other
    seeds is another figure.
    """
    task = study.task(pair)
    if task is None:
        return {}
    found = {metric.name: Evidence(metric) for metric in METRICS[task]}
    for seeds in dict.fromkeys(study.planned[p] for p in study.places(pair)):
        places = [
            p
            for p in study.places(pair)
            if (p.method == ORIGINAL or study.planned[p] == seeds) and set(study.cells.get(p, {})) >= set(seeds)
        ]
        stored = _stored(study, places, seeds)
        for metric in METRICS[task]:
            fresh = _evidence(study, pair, metric, places, seeds, stored, replicates, seed)
            found[metric.name] = _joined(found[metric.name], fresh)
    return found


def _joined(first: Evidence, other: Evidence) -> Evidence:
    """What two groups of places say; on a place that is in both, the first one speaks."""
    return Evidence(
        first.metric,
        {**other.intervals, **first.intervals},
        {**other.against, **first.against},
        {**other.marks, **first.marks},
        first.comparisons + other.comparisons,
    )


def _evidence(
    study: Study,
    pair: Pairing,
    metric: Metric,
    places: Sequence[Place],
    seeds: Sequence[int],
    stored: Mapping[Place, Sequence[StoredArrays]] | None,
    replicates: int,
    seed: int,
) -> Evidence:
    figures = {p: [study.values(p, metric.name).get(s) for s in seeds] for p in places}
    known = {p: [v for v in by_seed if v is not None] for p, by_seed in figures.items() if None not in by_seed}
    if not known or (stored is None and len(seeds) < 2):
        return Evidence(metric)
    sign = 1.0 if metric.rising else -1.0
    drawn = None
    if stored is not None:
        drawn = _bootstrap(study, pair, metric, {p: stored[p] for p in known}, replicates, seed)

    def difference(a: Place, b: Place) -> Interval:
        if drawn is not None:
            return _turned(drawn.difference(_key(a), _key(b), LEVEL), sign)
        return _turned(statisticss.paired_t(known[a], known[b], LEVEL), sign)

    how: IntervalBasis = "seeds" if drawn is None else "rows" if len(seeds) == 1 else "seeds and rows"
    dense = Place(pair, ORIGINAL, DENSE)
    marks: dict[Place, Mark] = {}
    found: list[Comparison] = []
    for budget in study.budgets(pair.data):
        ranked = sorted((p for p in known if p.budget == budget), key=lambda p: -sign * float(np.mean(known[p])))
        tested = [(a, b) for i, a in enumerate(ranked[:2]) for b in ranked[i + 1 :]]
        intervals = [difference(a, b) for a, b in tested]
        corrected = statisticss.holm([i.p for i in intervals]).tolist()
        comparisons = [
            Comparison(a, b, metric.name, i, p, how) for (a, b), i, p in zip(tested, intervals, corrected, strict=True)
        ]
        found += comparisons
        marks |= _marks(ranked, comparisons)
    return Evidence(
        metric,
        {p: drawn.mean(_key(p), LEVEL) for p in known} if drawn is not None else {},
        {p: difference(p, dense) for p in known if p != dense} if dense in known else {},
        marks,
        tuple(found),
    )


def _marks(ranked: Sequence[Place], comparisons: Sequence[Comparison]) -> dict[Place, Mark]:
    """The first one is marked if it beats all others; then the second, if it beats all but the first."""
    marks: dict[Place, Mark] = {}
    words: tuple[Mark, Mark] = ("best", "second")
    for place, mark in zip(ranked[:2], words, strict=False):
        own = [c for c in comparisons if c.place == place]
        if not own or not all(c.better for c in own):
            break
        marks[place] = mark
    return marks


def _stored(study: Study, places: Sequence[Place], seeds: Sequence[int]) -> dict[Place, list[StoredArrays]] | None:
    """Predictions of all places and seeds; ``None`` if any is missing, so that all comparisons are of one kind."""
    found: dict[Place, list[StoredArrays]] = {}
    for place in places:
        for seed in seeds:
            arrays = study.predictions(study.cells[place][seed])
            if arrays is None:
                return None
            found.setdefault(place, []).append(arrays)
    return found


def _bootstrap(
    study: Study,
    pair: Pairing,
    metric: Metric,
    stored: Mapping[Place, Sequence[StoredArrays]],
    replicates: int,
    seed: int,
) -> Bootstrap:
    """One set of draws for all places of a pair; where all seeds share a split, they share its rows, too."""
    statistics = {_key(p): [statistic(metric.name, a) for a in by_seed] for p, by_seed in stored.items()}
    sizes = [test_rows(a) for a in next(iter(stored.values()))]
    shared = not study.plan["data"][pair.data].get("split_by_seed", False) and len(set(sizes)) == 1
    return statisticss.bootstrap(statistics, sizes, replicates=replicates, seed=seed, shared_rows=shared)


def statistic(metric: str, arrays: StoredArrays) -> Statistic:
    """A figure as a function of how often each row or user counts."""
    if metric == "auc":
        return statisticss.auc_statistic(arrays["labels"], arrays["logits"], exact=len(arrays["labels"]) <= EXACT_ROWS)
    if metric == "logloss":
        logits = np.asarray(arrays["logits"], dtype=np.float64)
        return statisticss.mean_statistic(np.logaddexp(0.0, np.where(arrays["labels"] == 1, -logits, logits)))
    return statisticss.mean_statistic(arrays[metric.partition("@")[0]])


def test_rows(arrays: StoredArrays) -> int:
    """Test rows, or users."""
    return len(next(iter(arrays.values())))


def _turned(interval: Interval, sign: float) -> Interval:
    """The interval of a difference in favour of the first one, whichever way the figure goes."""
    if sign > 0:
        return interval
    return Interval(-interval.estimate, -interval.high, -interval.low, interval.p, interval.level)


def _key(place: Place) -> str:
    return f"{place.method} {place.budget}"
