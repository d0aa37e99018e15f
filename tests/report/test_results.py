"""What is kept of the studies in ``bench/results`` is enough to make their reports again."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import pytest

from pocketrec import report
from pocketrec.report.records import Study

RESULTS = Path(__file__).parents[2] / "bench" / "results"
STUDIES = sorted(plan.parent for plan in RESULTS.glob("*/plan.json"))
RECORDS = ("plan.json", "machine.json", "journal", "ledger.journal", "evidence.json")


def test_there_are_studies():
    assert len(STUDIES) >= 9


@pytest.mark.parametrize("kept", STUDIES, ids=lambda path: path.name)
def test_the_report_comes_again_from_what_is_kept(kept, tmp_path):
    for name in RECORDS:
        shutil.copy(kept / name, tmp_path / name)
    with mock.patch("os.fsync"):
        written = report.write(tmp_path)
    made = {path.name: path for path in (tmp_path / "report").iterdir()}
    shown = {path.name: path for path in kept.iterdir() if path.suffix in (".md", ".svg")}
    assert {name for name in made if name.endswith(".md")} == {name for name in shown if name.endswith(".md")}
    for name, path in shown.items():
        assert made[name].read_bytes() == path.read_bytes(), name
    assert {p.stem for p in written.tables if p.suffix == ".csv"} == {
        p.stem for p in shown.values() if p.suffix == ".md"
    }
    page = written.page.read_text(encoding="utf-8")
    assert all(str(pair) in page for pair in Study.read(kept).pairs)
    assert made["evidence.json"].read_bytes() == (kept / "evidence.json").read_bytes()
    assert {path.name for path in kept.iterdir()} - shown.keys() == set(RECORDS)
