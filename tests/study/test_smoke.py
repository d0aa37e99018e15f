"""The shipped smoke study, end to end by the command: search, cells, anatomy, efficiency, report."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pocketrec.files import Journal
from pocketrec.format.arrays import open_arrays
from pocketrec.study.jobs import Grid
from pocketrec.study.plan import Plan

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "study"
    command = [sys.executable, "-m", "pocketrec.cli", "bench", "smoke", "--out", str(folder), "--json"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1500)
    return folder, json.loads(ended.stdout)


def test_every_job_is_done(smoke):
    folder, document = smoke
    assert (document["done"], document["failed"]) == (len(Grid(Plan.read("smoke")).jobs), 0)
    kinds = {r["kind"] for r in Journal(folder / "journal").read()}
    assert kinds == {"choice", "trial", "cell", "anatomy", "efficiency"}


def test_the_page_stands_alone(smoke):
    page = (smoke[0] / "report" / "index.html").read_text(encoding="utf-8")
    assert len(page) < 1_500_000
    assert not re.search(r"""(src|href)=["']https?://""", page)
    assert "viewport" in page
    assert "<svg" in page


def test_the_tables_say_what_the_predictions_say(smoke):
    folder, _ = smoke
    with (folder / "report" / "quality-clicks.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "shaver"]
    means: dict[str, list[float]] = {}
    for cell in (r for r in Journal(folder / "journal").read() if r["kind"] == "cell" and r["method"] == "shaver"):
        labels = open_arrays(folder / "labels" / f"clicks-{cell['seed']}.safetensors")[0]["labels"]
        logits = open_arrays(folder / cell["predictions"])[0]["logits"]
        means.setdefault(cell["budget"], []).append(roc_auc_score(labels, logits))
    expected = sorted(float(np.mean(figures)) for figures in means.values())
    assert sorted(float(row["deepfm AUC"]) for row in rows) == pytest.approx(expected, abs=1e-9)
