"""Figures computed again from stored predictions, what is marked, and what is not."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from report_cases import row_of, rows, stored, tables_of
from sklearn.metrics import log_loss, roc_auc_score
from study_folder import BUDGETS, HARM, SEEDS, write_study

from pocketrec import report
from pocketrec.errors import ArtifactError
from pocketrec.files import Journal
from pocketrec.format.arrays import open_arrays
from pocketrec.report import formats
from pocketrec.report.compare import evidence
from pocketrec.report.records import Pairing, Place, Study
from pocketrec.report.tables.transfer import retention, standings


def test_budgets_of_one_seed_are_compared_on_it(tmp_path):
    folder = write_study(tmp_path / "brief", gaps=False)
    document = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    document["jobs"] = [j for j in document["jobs"] if j["budget"] != BUDGETS[2] or j["seed"] == SEEDS[0]]
    (folder / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    study = Study.read(folder)
    found = evidence(study, Pairing("criteo", "deepfm"), replicates=100)["auc"]
    assert {c.place.budget: c.how for c in found.comparisons} == {
        BUDGETS[0]: "seeds and rows",
        BUDGETS[1]: "seeds and rows",
        BUDGETS[2]: "rows",
    }
    place = Place(Pairing("criteo", "deepfm"), "shaver", BUDGETS[2])
    dense = Place(Pairing("criteo", "deepfm"), "original", "dense")
    first = study.values(place, "auc")[SEEDS[0]] - study.values(dense, "auc")[SEEDS[0]]
    assert found.against[place].estimate == pytest.approx(first)
    page = report.write(folder, replicates=100).page.read_text(encoding="utf-8")
    assert page.count("(1 of 3 seeds)") == len(HARM) * 3


def click_figures(folder, method, budget):
    """AUC and log-loss by seed, from files, by scikit-learn."""
    figures = []
    for seed in SEEDS:
        labels = open_arrays(folder / "labels" / f"criteo-{seed}.safetensors")[0]["labels"]
        logits = stored(folder, "criteo", "deepfm", method, budget, seed)["logits"].astype(np.float64)
        figures.append((roc_auc_score(labels, logits), log_loss(labels, 1 / (1 + np.exp(-logits)))))
    return np.array(figures)


@pytest.mark.parametrize(
    ("method", "budget"), [("original", "dense"), ("shaver", "sparsity=0.8"), ("mag_prune", "sparsity=0.95")]
)
def test_click_figures_are_those_of_scikit_learn_on_stored_predictions(folder, written, method, budget):
    row = row_of(rows(folder, "quality-criteo"), method, formats.budget(budget))
    figures = click_figures(folder, method, budget)
    for i, name in enumerate(("AUC", "log-loss")):
        assert float(row[f"deepfm {name}"]) == pytest.approx(figures[:, i].mean(), abs=1e-9)
        assert float(row[f"deepfm {name} sd"]) == pytest.approx(figures[:, i].std(ddof=1), abs=1e-9)


@pytest.mark.parametrize("method", ["original", "pep", "shaver"])
def test_ranking_figures_are_means_of_stored_figures_per_user(folder, written, method):
    budget = "dense" if method == "original" else "sparsity=0.95"
    row = row_of(rows(folder, "quality-gowalla"), method, formats.budget(budget))
    for name, array in (("NDCG@20", "ndcg"), ("recall@20", "recall"), ("recall@20 capped", "recall_capped")):
        means = [stored(folder, "gowalla", "lightgcn", method, budget, s)[array].mean() for s in SEEDS]
        assert float(row[f"lightgcn {name}"]) == pytest.approx(np.mean(means), abs=1e-12)


def test_intervals_are_those_of_a_plain_bootstrap(folder):
    """Written anew with repeated rows and scikit-learn: seeds, then one draw of rows for all; noise of 200 draws."""
    study = Study.read(folder)
    pair, budget = Pairing("criteo", "deepfm"), "sparsity=0.8"
    found = evidence(study, pair, replicates=600)["auc"]
    logits = {m: [stored(folder, "criteo", "deepfm", m, b, s)["logits"] for s in SEEDS]
              for m, b in (("shaver", budget), ("original", "dense"))}  # fmt: skip
    labels = open_arrays(folder / "labels" / "criteo-0.safetensors")[0]["labels"]
    rng, draws = np.random.default_rng(5), []
    for _ in range(200):
        seeds, drawn = rng.integers(0, len(SEEDS), len(SEEDS)), rng.integers(0, len(labels), len(labels))
        both = [
            np.mean([roc_auc_score(labels[drawn], logits[m][s][drawn]) for s in seeds]) for m in ("shaver", "original")
        ]
        draws.append(both[0] - both[1])
    got = found.against[Place(pair, "shaver", budget)]
    assert (got.low, got.high) == pytest.approx(tuple(np.quantile(draws, (0.025, 0.975))), abs=0.5 * np.std(draws))
    assert got.estimate == pytest.approx(np.mean(draws), abs=0.2 * np.std(draws))


def test_every_stored_figure_was_computed_again(page):
    assert (match := re.search(r"(\d+) figures were computed again .* deviation is ([\d.e-]+)\.", page))
    assert int(match[1]) > 60
    assert float(match[2]) < 1e-9


def test_retained_shares(folder, written):
    study = Study.read(folder)
    place = Place(Pairing("criteo", "deepfm"), "shaver", "sparsity=0.8")
    ours, dense = (
        click_figures(folder, m, b)[:, 0].mean() for m, b in (("shaver", "sparsity=0.8"), ("original", "dense"))
    )
    assert retention(study, place) == pytest.approx((ours / dense, (ours - 0.5) / (dense - 0.5)))
    row = next(r for r in rows(folder, "transfer") if (r["budget"], r["method"]) == ("80 % sparse", "shaver"))
    both = [retention(study, Place(Pairing(d, "deepfm"), "shaver", "sparsity=0.8"))[0] for d in ("criteo", "avazu")]
    assert float(row["overall ctr"]) == pytest.approx(np.mean(both))


def test_best_and_second_are_marked_where_they_are_so_beyond_doubt(folder, written):
    found = {
        r["method"]: r["lightgcn NDCG@20 mark"] for r in rows(folder, "quality-gowalla") if r["budget"] == "95 % sparse"
    }
    assert found == {"shaver": "best", "pep": "second", "qr": "", "mag_prune": ""}
    markdown = (folder / "report" / "quality-gowalla.md").read_text(encoding="utf-8")
    assert "| shaver | **" in markdown
    assert "| pep | <u>" in markdown


def test_nothing_is_marked_among_equals(tmp_path, monkeypatch):
    """All methods alike but for noise of their own: no mark at any budget."""
    monkeypatch.setattr("study_folder.HARM", dict.fromkeys(HARM, 0.6))
    study = Study.read(write_study(tmp_path / "equal", gaps=False))
    for data in ("criteo", "avazu"):
        assert evidence(study, Pairing(data, "deepfm"), replicates=400)["auc"].marks == {}


def test_log_loss_is_better_when_it_is_lower(folder):
    found = evidence(Study.read(folder), Pairing("criteo", "deepfm"), replicates=200)
    by_auc, by_loss = (
        {p.method: m for p, m in found[n].marks.items() if p.budget == BUDGETS[2]} for n in ("auc", "logloss")
    )
    assert by_auc == by_loss
    assert by_loss["shaver"] == "best"


def test_without_predictions_seeds_alone_decide_and_the_report_says_so(tmp_path):
    study = write_study(tmp_path / "bare", predictions=False)
    written = report.write(study, replicates=100)
    assert all(r["resampled"] == "seeds" for r in rows(study, "comparisons"))
    assert "no predictions were kept" in (study / "report" / "quality-criteo.md").read_text(encoding="utf-8")
    assert "computed again" not in written.page.read_text(encoding="utf-8")


def test_without_predictions_a_report_takes_what_they_came_to_from_its_evidence(tmp_path):
    study = write_study(tmp_path / "kept", seeds=(0, 1))
    report.write(study, replicates=100)
    before = tables_of(study)
    for name in ("predictions", "labels"):
        shutil.rmtree(study / name)
    written = report.write(study, replicates=100)
    assert tables_of(study) == before
    assert any(r["resampled"] == "seeds and rows" for r in rows(study, "comparisons"))
    assert "computed again" not in written.page.read_text(encoding="utf-8")
    (study / "report" / "evidence.json").rename(study / "evidence.json")
    shutil.rmtree(study / "report")
    report.write(study, replicates=100)
    assert tables_of(study) == before


def test_evidence_of_other_records_or_draws_does_not_count(tmp_path):
    study = write_study(tmp_path / "kept", seeds=(0, 1))
    report.write(study, replicates=100)
    shutil.rmtree(study / "predictions")
    evidence_of = (study / "report" / "evidence.json").read_bytes()
    report.write(study, replicates=200)
    assert {r["resampled"] for r in rows(study, "comparisons")} == {"seeds"}
    (study / "evidence.json").write_bytes(evidence_of)
    journal = Journal(study / "journal")
    last = next(r for r in journal.read() if r["kind"] == "cell" and r["data"] == "criteo" and r["method"] == "shaver")
    journal.append({**last, "test": {**last["test"], "auc": last["test"]["auc"] - 0.01}})
    report.write(study, replicates=100)
    found = {(r["data"], r["resampled"]) for r in rows(study, "comparisons")}
    assert found == {("criteo", "seeds"), ("avazu", "seeds and rows"), ("gowalla", "seeds and rows")}


@pytest.mark.parametrize(
    "content",
    [b"[", b"[]", b'{"pairs": [{}]}', b'{"pairs": 1}', None],
    ids=["torn", "list", "nameless", "number", "marks"],
)
def test_damaged_evidence_is_refused(tmp_path, content):
    study = write_study(tmp_path / "kept", seeds=(0, 1))
    report.write(study, replicates=100)
    shutil.rmtree(study / "predictions")
    path = study / "report" / "evidence.json"
    if content is None:
        document = json.loads(path.read_bytes())
        for pair in document["pairs"]:
            for found in pair["metrics"].values():
                del found["marks"]
        content = json.dumps(document).encode()
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"evidence\.json .*is damaged"):
        report.write(study, replicates=100)


def test_one_seed_without_predictions_allows_no_claim(tmp_path):
    study = write_study(tmp_path / "one", predictions=False, seeds=(0,), gaps=False)
    report.write(study)
    assert not (study / "report" / "comparisons.csv").exists()
    assert all(r["deepfm AUC mark"] == "" and r["deepfm AUC vs original"] == "" for r in rows(study, "quality-criteo"))
    assert "nothing could be tested" in (study / "report" / "quality-criteo.md").read_text(encoding="utf-8")


def test_one_seed_with_predictions_says_that_only_rows_were_drawn(tmp_path):
    study = write_study(tmp_path / "rows", seeds=(0,), gaps=False)
    report.write(study, replicates=200)
    assert {r["resampled"] for r in rows(study, "comparisons")} == {"rows"}


def test_ranks_are_of_methods_with_a_figure_everywhere(folder):
    found = standings(Study.read(folder))
    assert found["sparsity=0.5"].average.keys() == {"mag_prune", "pep", "shaver"}
    assert found["sparsity=0.8"].average["shaver"] == 1.0
