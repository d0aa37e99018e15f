"""Reports of whole studies, half ones and damaged ones, by the command and without."""

from __future__ import annotations

import json
import re

import pytest
from report_cases import rows
from study_folder import write_study

from pocketrec import cli, report
from pocketrec.errors import ArtifactError, DataError
from pocketrec.files import Journal
from pocketrec.report.records import Study


def test_failed_and_missing_cells_are_shown_as_such(folder, written, page):
    assert written.counts == {"done": 106, "failed": 2, "missing": 9}
    criteo = (folder / "report" / "quality-criteo.md").read_text(encoding="utf-8")
    assert re.search(r"\| qr \| failed \|", criteo)
    assert "(2 of 3 seeds)" in criteo
    assert re.search(r"\| qr \| not run \|", (folder / "report" / "quality-gowalla.md").read_text(encoding="utf-8"))
    assert {r["error"] for r in rows(folder, "failures")} == {"DivergedError: the loss is not finite"}
    assert "the loss is not finite" in page


def test_a_cell_that_succeeds_after_a_failure_is_done(tmp_path):
    study = write_study(tmp_path / "again", gaps=False)
    before = Study.read(study).count()
    record = next(r for r in Journal(study / "journal").read() if r["kind"] == "cell" and r["method"] == "qr")
    labels = {k: record[k] for k in ("data", "backbone", "method", "budget", "seed", "key")}
    Journal(study / "journal").append({**labels, "kind": "failed", "job": "cell", "error": "StorageError: disk full"})
    assert Study.read(study).count()["failed"] == before["failed"] + 1
    Journal(study / "journal").append(record)
    assert Study.read(study).count() == before


def test_records_of_an_earlier_plan_do_not_count(tmp_path):
    study = write_study(tmp_path / "changed", gaps=False)
    before = Study.read(study)
    record = next(r for r in Journal(study / "journal").read() if r["kind"] == "cell" and r["method"] == "qr")
    Journal(study / "journal").append({**record, "key": "another", "test": {"auc": 1.0, "logloss": 0.0}})
    after = Study.read(study)
    assert after.cells == before.cells
    assert after.count() == before.count()


def test_the_same_records_give_the_same_bytes(folder, written):
    before = {p: p.read_bytes() for p in (written.page, *written.tables)}
    again = report.write(folder, replicates=300)
    assert {p: p.read_bytes() for p in (again.page, *again.tables)} == before


def test_a_folder_without_a_study_is_refused_and_left_alone(tmp_path):
    with pytest.raises(DataError, match=r"plan\.json"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "x"}'])
def test_a_damaged_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"plan\.json"):
        report.write(tmp_path)


def test_a_study_without_any_record_yet_has_a_report(tmp_path):
    job = {"kind": "cell", "data": "a", "backbone": "b", "method": "c", "budget": "5%", "seed": 0, "key": "k"}
    plan = {"name": "empty", "seeds": [0], "budgets": ["5%"], "data": {"a": {}}, "methods": {"c": {}}, "jobs": [job]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    written = report.write(tmp_path)
    assert written.counts == {"done": 0, "failed": 0, "missing": 1}
    assert not (tmp_path / "journal").exists()


def test_the_command_writes_the_report(tmp_path, capsys):
    folder = write_study(tmp_path / "small", rows=200, users=60, seeds=(0,))
    cli.main(["report", str(folder), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["report"] == str(folder / "report" / "index.html")
    assert (document["cells"], document["failed"], document["missing"]) == (36, 0, 3)
    assert str(folder / "report" / "quality-criteo.csv") in document["tables"]


def test_the_command_refuses_another_folder_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["report", str(tmp_path)])
    assert left.value.code == 3
    assert capsys.readouterr().err.count("\n") == 1
