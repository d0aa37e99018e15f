"""Every table of a report that has something to say."""

from __future__ import annotations

from pocketrec.report.records import Study
from pocketrec.report.sheet import Sheet
from pocketrec.report.tables.cost import efficiency
from pocketrec.report.tables.extras import beyond_accuracy, facts, first_ten
from pocketrec.report.tables.place import EvidenceByPair
from pocketrec.report.tables.provenance import failures, ledger, settings
from pocketrec.report.tables.published import published
from pocketrec.report.tables.quality import comparisons, quality, within
from pocketrec.report.tables.transfer import ranked, retain, transferred


def sheets(study: Study, known: EvidenceByPair) -> list[Sheet]:
    """Every table that has something to say."""
    data = list(dict.fromkeys(p.data for p in study.pairs))
    made = [
        *(quality(study, known, d) for d in data),
        within(study, known),
        retain(study, known),
        transferred(study),
        ranked(study),
        comparisons(study, known),
        *(published(study, d) for d in data),
        first_ten(study),
        facts(study),
        beyond_accuracy(study),
        efficiency(study),
        settings(study),
        failures(study),
        ledger(study),
    ]
    return [sheet for sheet in made if sheet.rows]
