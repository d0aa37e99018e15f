"""A study that is killed again and again ends with the records of one that was left alone.

    POCKETREC_DATA=... python bench/killed_study.py PLAN WHOLE OUT [--kills 8]

``WHOLE`` is the folder of the study that ran undisturbed. The same plan is started in the fresh folder ``OUT`` with a
store of its own (trained models named by ``--seed-store`` are copied into it first), is sent SIGKILL after a random
time, is started again, and so on; then all records of both journals are compared, but for what clock and memory say.
Writes ``bench/results/killed_study.md``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from configs import RESULTS

from pocketrec.files import Journal
from pocketrec.randomness import generator

CLOCK = ("seconds", "latency_us", "peak_mib", "curve")


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """What the journal of a study says of the jobs of its plan, without the clock."""
    jobs = {job["key"] for job in json.loads((folder / "plan.json").read_text())["jobs"] if job["kind"] != "efficiency"}
    return {
        f"{r['key']} {r['kind']} {r.get('trial', '')}": {k: v for k, v in r.items() if k not in CLOCK}
        for r in Journal(folder / "journal").read()
        if r["key"] in jobs and r["kind"] != "failed"
    }


def killed(plan: str, folder: Path, kills: int, longest: float) -> list[float]:
    """Run the study to its end, killing it on the way; seconds of each start."""
    draw, spans = generator(0, "kills"), []
    command = [sys.executable, "-m", "pocketrec.cli", "bench", plan, "--out", str(folder), "--no-report"]
    while True:
        started = time.monotonic()
        process = subprocess.Popen([*command, "--store", str(folder / "store")])
        try:
            process.wait(draw.uniform(5, longest) if len(spans) < kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        spans.append(time.monotonic() - started)
        print(f"start {len(spans)}: {spans[-1]:.0f} s, exit {process.returncode}", flush=True)
        if process.returncode == 0:
            return spans


def main() -> None:
    """Kill, resume, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan")
    parser.add_argument("whole", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed-store", type=Path, nargs="*", default=[])
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--longest", type=float, default=120.0)
    options = parser.parse_args()
    (options.out / "store").mkdir(parents=True, exist_ok=True)
    for model in options.seed_store:
        shutil.copy(model, options.out / "store")
    spans = killed(options.plan, options.out, options.kills, options.longest)
    one, two = records(options.whole), records(options.out)
    equal = sum(two.get(name) == record for name, record in one.items())
    again = sum(entry["again"] for entry in Journal(options.out / "ledger.journal").read())
    lines = [
        "# A study that was killed", "",
        f"`bench/killed_study.py {options.plan}`: SIGKILL at {len(spans) - 1} random moments (each start lived "
        f"{min(spans):.0f} to {max(spans):.0f} s), then left to end. Compared with the study that ran undisturbed: all "
        "records of its jobs (choices, trials, cells with quality, bytes and file digests), without the clock.", "",
        "| records of the undisturbed study | equal in the killed one | only in the killed one | test reads repeated |",
        "| ---: | ---: | ---: | ---: |",
        f"| {len(one)} | {equal} | {len(two.keys() - one.keys())} | {again} |",
    ]  # fmt: skip
    (RESULTS / "killed_study.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
