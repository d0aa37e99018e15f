"""Opening a file and its first score in a fresh process: with ``constants.bin``, and with its numbers computed.

    POCKETREC_DATA=... python bench/opening.py

A click model (DeepFM on MovieLens-1M, ``rate_distortion`` at 5 %) and a ranking (MF on Last.fm, ``rate_distortion`` at
5 %) are trained for an epoch and stored. Then fresh processes take turns: in some the quantiser's levels and the
trellis codes' tables are read from ``constants.bin``, in the others they are computed by their definition where they
are first asked for, as they were before the file was there. Timed by the wall, once ``pocketrec.runtime`` is imported:
``open``, one ``score``, and the whole process with its imports. Modules are compiled beforehand.

Writes ``bench/results/opening.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

RESULTS = Path(__file__).parent / "results"
WAYS = {"computed": "computed", "constants.bin": "read"}
PARTS = ("open", "score", "open and score", "process")
FILES = ("ml-1m click model", "Last.fm ranking")


def child(file: str, way: str) -> None:
    """One opening in this process; prints its seconds as JSON."""
    import constants_definition

    from pocketrec import runtime
    from pocketrec.format import constants

    if way == "computed":
        constants.levels = constants_definition.levels
        constants.trellis = lambda number: constants_definition.trellis(*constants_definition.TRELLISES[number - 1])
    start = time.perf_counter()
    model = runtime.open(file)
    opened = time.perf_counter()
    score = model.score(dict.fromkeys((f.name for f in model.schema.fields), 3))
    scored = time.perf_counter()
    parts = (opened - start, scored - opened, scored - start)
    print(json.dumps({**dict(zip(PARTS, parts, strict=False)), "value": score}))


def make(folder: Path) -> dict[str, Path]:
    """Both files."""
    import pocketrec as pr

    raw = Path(os.environ["POCKETREC_DATA"])
    once = pr.Training(epochs=1, batch_size=2048)
    clicks = pr.encode(pr.sources.Table(drop=("rating",)), raw / "ml-1m-ctr" / "ratings.parquet", folder / "clicks")
    deep = pr.train(pr.backbones.DeepFM(), clicks, folder / "deepfm", training=once)
    pairs = raw / "lastfm-lightgcn"
    visits = pr.encode(
        pr.sources.Interactions(), pairs / "train.parquet", folder / "visits", test=pairs / "test.parquet"
    )
    mf = pr.train(pr.backbones.MF(), visits, folder / "mf", training=once)
    files = {name: folder / f"{i}.safetensors" for i, name in enumerate(FILES)}
    for (model, data), path in zip(((deep, clicks), (mf, visits)), files.values(), strict=True):
        pr.compress(model, data, pr.methods.RateDistortion(), "5%").save(path)
    return files


def main() -> None:
    """Make the files, time both ways in turns, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--child", nargs=2)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make(folder)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPYCACHEPREFIX": str(folder / "cache")}
        turns = {(file, way): [] for file in files for way in WAYS}
        for number in range(options.rounds + 1):
            for (file, way), found in turns.items():
                command = [sys.executable, __file__, "--child", str(files[file]), WAYS[way]]
                start = time.perf_counter()
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                seconds = json.loads(done.stdout) | {"process": time.perf_counter() - start}
                if number:
                    found.append(seconds)
        sizes = {file: path.stat().st_size for file, path in files.items()}
    same = all(len({t["value"] for way in WAYS for t in turns[file, way]}) == 1 for file in files)
    write(turns, sizes, options.rounds, same)


def write(turns: dict[tuple[str, str], list[dict[str, float]]], sizes: dict[str, int], rounds: int, same: bool) -> None:
    """The results as a page."""
    text = "# Opening a file\n" + (__doc__ or "").split("\n\n", 2)[2].rsplit("\n\n", 1)[0].join(("\n", "\n"))
    load = psutil.getloadavg()[0]
    text += (
        f"\nMilliseconds, medians of {rounds} processes (10-90 % range); load average at the end {load:.1f} on "
        f"{os.cpu_count()} processors. The score is the same bit for bit: {'yes' if same else 'NO'}.\n\n"
        f"| file | numbers | {' | '.join(PARTS)} |\n|---|---|{'---|' * len(PARTS)}\n"
    )
    for (file, way), found in turns.items():
        cells = []
        for part in PARTS:
            values = sorted(1000 * t[part] for t in found)
            low, *_, high = statistics.quantiles(values, n=10)
            cells.append(f"{statistics.median(values):.1f} ({low:.1f}-{high:.1f})")
        text += f"| {file}, {sizes[file]:,} B | {way} | {' | '.join(cells)} |\n"
    (RESULTS / "opening.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
