"""The demo in small: it goes from the log to the picture, twice the same, and goes on where it was."""

from __future__ import annotations

import json
import re

import pytest

from pocketrec.command import demo
from pocketrec.command.picture import Chart, MeasuredFile, page, png, size, summary
from pocketrec.format.artifact import Artifact


class Silent:
    def __call__(self, stage, done, total, figures):
        """Nobody watches."""

    def rows(self, stage, done):
        """Nobody watches."""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def report(out):
    return demo.run(out, seed=0, threads=1, watcher=Silent(), rows=60_000)


def test_every_method_and_budget_is_a_measured_file(report, out):
    assert list(report.chart.curves) == ["RateDistortion", "Shaver", "MagPrune", "FrequencyDistance"]
    for points in report.chart.curves.values():
        assert [p.budget for p in points] == list(demo.BUDGETS)
        for point in points:
            assert (
                point.auc is None
                or point.table_bytes <= report.chart.dense.table_bytes * float(point.budget[:-1]) / 100
            )
    reached = sum(p.auc is not None for points in report.chart.curves.values() for p in points)
    files = list((out / "artifacts").glob("*.safetensors"))
    assert len(files) == reached
    for file in files:
        Artifact(file).verify()


def test_the_teacher_is_the_ceiling(report):
    aucs = [p.auc for points in report.chart.curves.values() for p in points if p.auc is not None]
    assert 0.5 < report.chart.dense.auc < report.chart.ceiling
    assert max(aucs) < report.chart.ceiling


@pytest.mark.nightly
def test_the_table_matters(tmp_path):
    chart = demo.run(tmp_path, seed=0, threads=1, watcher=Silent()).chart
    for points in chart.curves.values():
        assert chart.dense.auc - points[-1].auc >= 0.02


def test_again_in_the_same_folder_reads_what_is_there(report, out):
    before = (out / "demo.png").read_bytes(), (out / "demo.html").read_bytes()
    stamps = {p: p.stat().st_mtime_ns for p in (out / "run").rglob("*.safetensors")}
    assert demo.run(out, seed=0, threads=1, watcher=Silent(), rows=60_000) == report
    assert ((out / "demo.png").read_bytes(), (out / "demo.html").read_bytes()) == before
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_another_folder_gives_the_same_artifacts(report, out, tmp_path):
    other = demo.run(tmp_path, seed=0, threads=1, watcher=Silent(), rows=60_000)
    assert other.chart.curves == report.chart.curves
    for file in (out / "artifacts").iterdir():
        assert (tmp_path / "artifacts" / file.name).read_bytes() == file.read_bytes()


def test_the_documents(report):
    document = json.loads(json.dumps(report.to_json()))
    assert document.keys() == {"out", "picture", "page", "teacher_auc", "dense", "curves"}
    text = report.to_text()
    assert text.count("\n") > 3 * len(demo.BUDGETS)
    assert "teacher" in text


def test_the_page_stands_alone(report, out):
    text = (out / "demo.html").read_text()
    assert "<svg" in text
    assert not re.findall(r'(?:src|href)="(?!#)', text)
    assert not re.findall(r"url\((?!#)", text)
    assert "<script" not in text
    assert 'name="viewport"' in text
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


DENSE = MeasuredFile("100%", 1000, 1100, 250, 0.75)
CHART = Chart(
    "Title <b>", "Under", {"A & B": (MeasuredFile("50%", 500, 600, 120, 0.749),)}, DENSE, 0.8, "pocketrec demo"
)


def test_a_picture_is_a_function_of_its_chart():
    assert png(CHART) == png(CHART)
    assert page(CHART) == page(CHART)


def test_text_on_the_page_is_escaped():
    text = page(CHART)
    assert "Title &lt;b&gt;" in text
    assert "A &amp; B" in text


def test_a_budget_out_of_reach_is_shown_as_such():
    far = MeasuredFile("1%", 0, 0, 0, None, note="out of reach at least 20 B")
    chart = Chart("T", "U", {"A": (*CHART.curves["A & B"], far)}, DENSE, 0.8, "pocketrec demo")
    assert "out of reach at least 20 B" in page(chart)
    assert png(chart).startswith(b"\x89PNG")


def test_sizes_and_summary():
    assert [size(n) for n in (12, 2048, 5_592_405, 3 << 30)] == ["12 B", "2 KiB", "5.33 MiB", "3 GiB"]
    assert summary(CHART.curves["A & B"], DENSE) == "2x smaller table within .002 AUC of the dense model"
    assert "no budget" in summary([MeasuredFile("1%", 10, 11, 2, 0.5)], DENSE)
