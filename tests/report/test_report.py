"""The report: its figures computed again from stored predictions, its marks, its gaps, and a page that stands alone."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
from html.parser import HTMLParser
from itertools import pairwise
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from study_folder import BUDGETS, HARM, SEEDS, write_study

from pocketrec import cli, report
from pocketrec.errors import ArtifactError, DataError
from pocketrec.files import Journal
from pocketrec.format.arrays import open_arrays
from pocketrec.report import chart, formats, papers
from pocketrec.report.compare import evidence
from pocketrec.report.records import Pairing, Place, Study
from pocketrec.report.sheet import Sheet, SheetColumn, SheetEntry, SheetRow
from pocketrec.report.tables.published import wall
from pocketrec.report.tables.transfer import retention, standings


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Nothing here has to survive a power loss, and the command's signal handler is taken back."""
    before = signal.getsignal(signal.SIGTERM)
    with mock.patch("os.fsync"):
        yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "whole")


@pytest.fixture(scope="module")
def written(folder):
    return report.write(folder, replicates=300)


@pytest.fixture(scope="module")
def page(written):
    return written.page.read_text(encoding="utf-8")


def rows(folder, name):
    with (folder / "report" / f"{name}.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


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


def stored(folder, data, backbone, method, budget, seed):
    key = f"{data}-{backbone}-{method}-{budget}-{seed}".replace("=", "-")
    return open_arrays(folder / "predictions" / f"{key}.safetensors")[0]


def row_of(found, method, budget="uncompressed"):
    return next(r for r in found if (r["method"], r["budget"]) == (method, budget))


# ---- an independent recomputation -----------------------------------------------------------------------------------


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


# ---- what is marked, and what is not --------------------------------------------------------------------------------


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


def tables_of(study):
    return {p.name: p.read_bytes() for p in (study / "report").iterdir() if p.suffix in (".md", ".csv")}


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


def test_ranks_are_of_methods_with_a_figure_everywhere(folder):
    found = standings(Study.read(folder))
    assert found["sparsity=0.5"].average.keys() == {"mag_prune", "pep", "shaver"}
    assert found["sparsity=0.8"].average["shaver"] == 1.0


# ---- beside the papers ----------------------------------------------------------------------------------------------


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


# ---- the page -------------------------------------------------------------------------------------------------------


class Outline(HTMLParser):
    """Balanced tags, identifiers, links, and what would be fetched."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.fetched, self.texts = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.fetched += [tag] if tag in ("script", "link", "img", "iframe") or "src" in given else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_light_and_needs_nothing_else(written, page):
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.fetched == []
    assert "url(" not in page
    assert "@import" not in page
    assert len(outline.ids) == len(set(outline.ids))
    for link in outline.links:
        if link.startswith("#"):
            assert link[1:] in outline.ids
        else:
            assert (written.page.parent / link).is_file()
    assert len(page.encode()) < 1_500_000


def test_the_page_shows_every_method_and_every_part(page):
    for method in ("original", *HARM):
        assert f'id="method-{method}"' in page
    for heading in (
        "Quality against size and speed",
        "Quality and size on criteo",
        "Time and memory",
        "Training",
        "Ranks across",
    ):
        assert heading in page
    for name in ("By learned values", "By bytes of the table", "By bytes of the file", "By median latency"):
        assert page.count(name) == 3
    assert "training.learning_rate" in page


def test_the_same_records_give_the_same_bytes(folder, written):
    before = {p: p.read_bytes() for p in (written.page, *written.tables)}
    again = report.write(folder, replicates=300)
    assert {p: p.read_bytes() for p in (again.page, *again.tables)} == before


def test_labels_are_shown_as_text_and_never_as_markup(tmp_path):
    study = write_study(tmp_path / "named", seeds=(0,), gaps=False)
    content = (study / "plan.json").read_text()
    (study / "plan.json").write_text(content.replace('"made-up"', json.dumps("<b>&amp;</b><script>")))
    page = report.write(study, replicates=100).page.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["linear", "log", "binary"])
@pytest.mark.parametrize("spread", [1.0, 1.0001, 30.0, 1e6])
def test_nothing_is_drawn_outside_of_a_figure_and_no_ticks_touch(scale, spread):
    dots = tuple(chart.Marker(1000.0 * spread**i, 0.7 + 0.01 * i, 0.001) for i in (0.0, 0.5, 1.0))
    drawn = chart.svg(chart.Figure("t", "x", "y", (chart.Line(0, dots),), formats.size, None, scale, dots[0]))
    for x, y in re.findall(r"translate\((-?[\d.]+) (-?[\d.]+)\)", drawn):
        assert chart.LEFT - 1 <= float(x) <= chart.WIDTH - chart.RIGHT + 1
        assert chart.TOP - 1 <= float(y) <= chart.HEIGHT - chart.BOTTOM + 1
    below = re.findall(rf'<text x="([\d.]+)" y="{chart.HEIGHT - chart.BOTTOM + 16:.1f}"[^>]*>([^<]*)<', drawn)
    ends = [(float(x) - 3 * len(t), float(x) + 3 * len(t)) for x, t in below]
    assert all(a[1] < b[0] for a, b in pairwise(ends))
    left = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', drawn)
    assert 2 <= len(left) <= 5
    assert len(left) == len(set(left))


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-9, 1e-5, 1e-3, 0.1])
def test_numbers_at_the_left_fit_there_however_close_the_points_are(gap):
    dots = (chart.Marker(1.0, 0.685061), chart.Marker(2.0, 0.685061 + gap))
    drawn = chart.svg(chart.Figure("t", "x", "y", (chart.Line(0, dots),)))
    left = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', drawn)
    assert 2 <= len(set(left)) == len(left)
    assert max(len(text) for text in left) <= 5


def test_bars_are_as_long_as_their_numbers():
    drawn = chart.bars("t", [chart.Bar("a", (4.0,), "4"), chart.Bar("b", (1.0, 2.0), "3")])
    lengths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)" height="8" fill', drawn)]
    assert lengths == [chart.WIDTH, chart.WIDTH / 4, chart.WIDTH / 2]


def test_colours_can_be_read_on_white():
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for color in (*chart.COLORS, chart.INK, chart.FAINT):
        assert 1.05 / (luminance(color) + 0.05) >= 4.5, color


def test_sheets_write_plain_values_and_marked_text():
    columns = (SheetColumn("a", words=True), SheetColumn("b"), SheetColumn("c", hidden=True))
    row = SheetRow((SheetEntry.of("x|y"), SheetEntry("1.2 MiB", 1234, "best"), SheetEntry("", 5)), "one")
    sheet = Sheet("s", "Title", columns, (row,), ("note",), "kind")
    assert sheet.csv() == "kind,a,b,c\none,x|y,1234,5\n"
    assert sheet.markdown() == "## Title\n\n|  | a | b |\n| --- | --- | ---: |\n| one | x\\|y | **1.2 MiB** |\n\nnote\n"


# ---- errors and the command -----------------------------------------------------------------------------------------


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


def test_pictures_are_files_of_their_own_with_every_line_named(written):
    assert len(written.pictures) == len({p.stem for p in written.pictures}) > 0
    for path in written.pictures:
        root = ElementTree.fromstring(path.read_text())  # noqa: S314
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        words = {e.text for e in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"uncompressed", "By learned values", "By bytes of the table"} <= words
        inside = [e for e in root if e.tag.endswith("svg")]
        width, height = float(root.get("width")), float(root.get("height"))
        assert all(0 <= float(e.get("x")) <= width - float(e.get("width")) for e in inside)
        assert all(0 <= float(e.get("y")) <= height - float(e.get("height")) for e in inside)
