"""What stands beside the papers, and tables of ten places and of facts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from report_cases import rows, stored
from study_folder import BUDGETS, HARM, SEEDS, write_study

from pocketrec import report
from pocketrec.files import Journal
from pocketrec.report import papers
from pocketrec.report.tables.published import wall


def test_published_retention_agrees_with_the_papers_table_7():
    """Table 7 is made of Tables 5 and 6: LightGCN's NDCG@20 and DCN-Mix's AUC over the original's."""
    columns = {
        "yelp2018_lightgcn_ndcg": ("yelp2018", "lightgcn", "ndcg@20"),
        "gowalla_lightgcn_ndcg": ("gowalla", "lightgcn", "ndcg@20"),
        "criteo_dcn_auc": ("criteo", "dcnmix", "auc"),
        "avazu_dcn_auc": ("avazu", "dcnmix", "auc"),
    }
    checked = 0
    for (sparsity, method), shares in papers.transfer().items():
        for column, (data, backbone, metric) in columns.items():
            row = papers.published().get((data, backbone, method, sparsity))
            if row is None or shares[column] is None:
                continue
            original = papers.published()[data, backbone, "original", "0"]
            assert row.figures[metric] / original.figures[metric] == pytest.approx(shares[column], abs=6e-5)
            checked += 1
    assert checked > 70


def test_published_figures_stand_beside_ours(folder, written):
    found = {(r["method"], r["budget"]): r for r in rows(folder, "published-gowalla")}
    row = found["mag_prune", "sparsity=0.95"]
    assert (row["data"], row["backbone"], row["source"]) == ("gowalla", "lightgcn", "Table 6")
    assert float(row["NDCG@20 published"]) == 0.0365
    assert float(row["recall@20 capped published"]) == 0.0474
    assert float(row["published retained"]) == pytest.approx(0.0365 / 0.1470)
    ours = np.mean(
        [stored(folder, "gowalla", "lightgcn", "mag_prune", "sparsity=0.95", s)["ndcg"].mean() for s in SEEDS]
    )
    assert float(row["NDCG@20 ours"]) == pytest.approx(ours)
    assert float(row["NDCG@20 difference"]) == pytest.approx(ours - 0.0365)
    assert float(row["NDCG@20 difference %"]) == pytest.approx(100 * (ours / 0.0365 - 1))


def test_the_table_beside_the_papers_has_every_place_and_what_it_took(folder, written):
    found = {(r["method"], r["budget"]): r for r in rows(folder, "published-gowalla")}
    assert found.keys() == {("original", "dense"), *((m, b) for m in HARM for b in BUDGETS)}
    alone = found["shaver", "sparsity=0.8"]
    assert (alone["NDCG@20 published"], alone["NDCG@20 difference"], alone["source"]) == ("", "", "")
    assert (alone["seeds"], float(alone["time"]), float(alone["memory"])) == ("3", 3.2, 701.0)
    assert float(found["original", "dense"]["time"]) == 123.7
    gap = found["qr", "sparsity=0.5"]
    assert (gap["NDCG@20 ours"], gap["seeds"], gap["time"], gap["memory"]) == ("not run", "0", "", "")
    assert float(gap["NDCG@20 published"]) == 0.1380
    failed = next(r for r in rows(folder, "published-criteo") if (r["method"], r["budget"]) == ("qr", "sparsity=0.95"))
    assert failed["AUC ours"] == "failed"
    text = (folder / "report" / "published-criteo.md").read_text(encoding="utf-8")
    assert "| 2 of 3 |" in text
    assert len(next(line for line in text.splitlines() if "| method |" in line).split("|")) <= 16


def test_settings_beside_the_papers_are_those_that_the_plan_names(tmp_path):
    study = write_study(tmp_path / "named", seeds=(0,), gaps=False)
    plan = json.loads((study / "plan.json").read_text())
    plan["backbones"]["deepfm"] |= {
        "settings": {"dim": 16},
        "training": [{"learning_rate": {"low": 1e-3, "high": 1.0}}],
    }
    plan["methods"]["pep"] |= {"on": {"criteo": {"settings": {"n_min": {"choices": [1, 2]}}}}}
    (study / "plan.json").write_text(json.dumps(plan))
    journal = Journal(study / "journal")
    for record in [r for r in journal.read() if r["kind"] == "cell" and (r["data"], r["method"]) == ("criteo", "pep")]:
        (first,) = record["params"]["training"]
        stages = [{**first, "learning_rate": 0.01}, {**first, "learning_rate": 0.001}]
        journal.append({**record, "params": {**record["params"], "training": stages}})
    report.write(study, replicates=100)
    found = {(r["method"], r["budget"]): r["settings"] for r in rows(study, "published-criteo")}
    assert found["original", "dense"] == "dim 16, learning_rate 0.0021"
    assert found["pep", "sparsity=0.8"] == "n_min 1, learning_rate 0.01 → 0.001"
    assert found["mag_prune", "sparsity=0.8"] == ""


def test_the_time_of_a_record_that_did_not_count_steps_from_the_store_is_not_told():
    record = {"seconds": {"train": 2.0, "compress": 1.0, "measure": 9.0}, "peak_mib": None}
    assert wall(record) == 3.0
    assert wall({**record, "seconds": {**record["seconds"], "train": None}}) is None
    assert wall({"seconds": record["seconds"]}) is None


def test_the_first_ten_places_are_set_against_the_best_other_method(folder, written):
    found = {(r["method"], r["budget"]): r for r in rows(folder, "top-10")}
    figures = {m: float(found[m, "sparsity=0.95"]["NDCG@10"]) for m in HARM}
    best, second = sorted(figures.values(), reverse=True)[:2]
    assert figures["shaver"] == best
    assert float(found["shaver", "sparsity=0.95"]["over the best other"]) == pytest.approx(best / second - 1)
    assert float(found["qr", "sparsity=0.95"]["over the best other"]) == pytest.approx(figures["qr"] / best - 1)
    assert found["original", "dense"]["over the best other"] == ""


def test_labels_of_one_plug_in_are_not_others_to_each_other(tmp_path):
    study = write_study(tmp_path / "variants", seeds=(0,), gaps=False)
    content = (study / "plan.json").read_text()
    (study / "plan.json").write_text(content.replace('"pep": {"plugin": "pep"}', '"pep": {"plugin": "shaver"}'))
    report.write(study, replicates=100)
    found = {r["method"]: r for r in rows(study, "top-10") if r["budget"] == "sparsity=0.8"}
    others = max(float(found[m]["NDCG@10"]) for m in ("mag_prune", "qr"))
    assert float(found["shaver"]["over the best other"]) == pytest.approx(
        float(found["shaver"]["NDCG@10"]) / others - 1
    )


def test_what_tables_tell_of_themselves_is_a_table(folder, written):
    found = rows(folder, "facts")
    assert {r["method"] for r in found} == {"qr"}
    assert float(found[0]["overlap"]) == 0.25
    assert float(found[0]["overlap user"]) == pytest.approx(0.2 + 0.1 * np.mean(SEEDS))


def test_the_papers_opt_embed_of_ranking_is_our_opt_embed_d():
    known = papers.published()
    assert known["gowalla", "lightgcn", "optembedd", "80"].figures["ndcg@20"] == 0.1168
    assert ("criteo", "deepfm", "optembedd", "80") not in known
    assert ("criteo", "deepfm", "optembed", "80") in known


@pytest.mark.parametrize(
    ("label", "name", "sample"),
    [
        ("criteo", "criteo", False),
        ("criteo-80k", "criteo", True),
        ("criteo80k", "criteo", True),
        ("yelp2018", "yelp2018", False),
        ("gowallaby", "gowallaby", False),
        ("avazu-9k", "avazu", True),
    ],
)
def test_labels_of_data_sets(label, name, sample):
    assert papers.data_set(label) == name
    assert papers.is_sample(label) == sample
