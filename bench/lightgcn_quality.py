"""LightGCN on Gowalla (three seeds) and Yelp2018 (one) by the published protocol, each measured once on test.

Run from the repository's root: ``POCKETREC_DATA=... python bench/lightgcn_quality.py``. A tenth of each user's training
pairs, at least one, validates; the graph holds the other pairs alone; all items but those are ranked, so validation
items stay candidates. Settings are in ``configs.py``, each chosen on the validation split of Gowalla. Models are
kept in ``cache/runs``; a killed run goes on where it was. Writes ``bench/results/lightgcn_quality.md`` and ``.csv``.
"""

from __future__ import annotations

import csv
import statistics
from dataclasses import asdict
from typing import Any

from configs import LIGHTGCN, LIGHTGCN_COOLING, LIGHTGCN_TRAINING, RESULTS, lightgcn, ranking_data

from pocketrec.measure import measure

RUNS = (("gowalla", 0), ("gowalla", 1), ("gowalla", 2), ("yelp2018", 0))
PUBLISHED = {"gowalla": {"ndcg@20": 0.1470, "recall_capped@20": 0.1787}, "yelp2018": {"ndcg@20": 0.0575}}
FIGURES = ("ndcg@20", "recall@20", "recall_capped@20")


def quality(name: str, seed: int) -> dict[str, Any]:
    """Figures of one training: validation's best NDCG@20, test figures, epochs and seconds."""
    model, run = lightgcn(name, seed)
    data = ranking_data(name)
    with run:
        test = measure(model, data.test, latency=False, ledger=run.ledger).quality
        valid = measure(model, data.valid, latency=False).quality
        epochs = {(entry["stage"], entry["epoch"]): entry["seconds"] for entry in run.logged() if "epoch" in entry}
    return {
        "data": name, "seed": seed, "epochs": len(epochs), "train_s": round(sum(epochs.values())),
        "valid ndcg@20": valid["ndcg@20"], **{f"test {figure}": test[figure] for figure in FIGURES},
    }  # fmt: skip


def write(rows: list[dict[str, Any]]) -> None:
    """``bench/results/lightgcn_quality.csv`` and ``.md``."""
    with (RESULTS / "lightgcn_quality.csv").open("w", newline="") as stream:
        table = csv.DictWriter(stream, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    lines = [
        "# LightGCN by the published protocol", "",
        f"{asdict(LIGHTGCN)}; {LIGHTGCN_TRAINING}; then {LIGHTGCN_COOLING.epochs} epochs at rate "
        f"{LIGHTGCN_COOLING.learning_rate}.", "",
        f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0]),
        *(f"| {' | '.join(shown(v) for v in row.values())} |" for row in rows), "",
        "| data | figure | mean | least | most | published | mean / published |", "|" + "---|" * 7,
        *(line for name in PUBLISHED for line in summary([row for row in rows if row["data"] == name])),
    ]  # fmt: skip
    (RESULTS / "lightgcn_quality.md").write_text("\n".join(lines) + "\n")


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """One line per published figure over the seeds of one data set."""
    lines = []
    for figure, published in PUBLISHED[rows[0]["data"]].items() if rows else ():
        values = [row[f"test {figure}"] for row in rows]
        mean = statistics.mean(values)
        lines.append(
            f"| {rows[0]['data']} | {figure} | {mean:.4f} | {min(values):.4f} | {max(values):.4f} | {published:.4f} "
            f"| {mean / published:.3f} |"
        )
    return lines


def shown(value: Any) -> str:
    """Four digits of a fraction; anything else as it is."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Train, measure, and write after every run."""
    rows: list[dict[str, Any]] = []
    for name, seed in RUNS:
        rows.append(quality(name, seed))
        print(rows[-1], flush=True)
        write(rows)


if __name__ == "__main__":
    main()
