"""Peak memory of ``encode`` follows the number of distinct values, not the number of rows.

Encodes 10^6 and 10^7 rows with the same distinct values, from csv, from parquet and from the generator, each in a child
process, and compares the peak resident sizes. Writes ``results/encode_memory.md``.

    python bench/encode_memory.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

from pocketrec.data.encode import encode
from pocketrec.data.source import Source
from pocketrec.sources.synthetic import Synthetic
from pocketrec.sources.table import Table

RESULTS = Path(__file__).parent / "results"
CARDINALITIES = (50_000, 50_000, 20_000, 20_000, 10_000, 1_000, 100, 10)
ROWS = (10**6, 10**7)
FORMATS = ("csv", "parquet", "generator")
LIMIT = 1.2


def main() -> None:
    """Measure every format and size, write the results, fail where the limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=4, metavar=("FORMAT", "ROWS", "RAW", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, rows, raw, out = arguments.child
        print(json.dumps(measure(kind, int(rows), Path(raw), Path(out))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in ROWS:
            write_raw(Path(folder), count)
            rows += [run_child(kind, count, Path(folder)) for kind in FORMATS]
    write_results(rows)


def generator(rows: int) -> Synthetic:
    """Uniform values, so that both sizes hold every value."""
    return Synthetic(rows=rows, cardinalities=CARDINALITIES, exponent=0.0, hashed=True)


def write_raw(folder: Path, rows: int) -> None:
    """The same rows as ``ROWS.csv`` and ``ROWS.parquet``."""
    path = folder / f"{rows}.csv"
    with path.open("wb") as file:
        for number, batch in enumerate(generator(rows).scan().batches):
            batch.frame.drop("teacher").write_csv(file, include_header=number == 0)
    pl.scan_csv(path, infer_schema=False).sink_parquet(path.with_suffix(".parquet"))


def run_child(kind: str, rows: int, folder: Path) -> dict[str, float | str]:
    """Measure one encoding in a process of its own."""
    raw, out = folder / f"{rows}.{kind}", folder / f"{rows}-{kind}-encoded"
    command = [sys.executable, __file__, "--child", kind, str(rows), str(raw), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    result = json.loads(done.stdout)
    print(result, file=sys.stderr)
    return result


def measure(kind: str, rows: int, raw: Path, out: Path) -> dict[str, float | str]:
    """Encode and report the peak resident size of this process, before and after."""
    source: Source = generator(rows) if kind == "generator" else Table(category=tuple(f"f{i}" for i in range(8)))
    before = peak_kib()
    start = time.perf_counter()
    data = encode(source, None if kind == "generator" else raw, out)
    seconds = time.perf_counter() - start
    peak = peak_kib()
    return {
        "format": kind,
        "rows": rows,
        "table_rows": data.schema.rows,
        "import_mib": round(before / 1024, 1),
        "peak_mib": round(peak / 1024, 1),
        "seconds": round(seconds, 1),
    }


def peak_kib() -> int:
    """Peak resident size of this process since it was started (``ru_maxrss`` would count its parent's too)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def write_results(rows: list[dict[str, float | str]]) -> None:
    """Write the table; exit with 1 where the larger log needs more than ``LIMIT`` times the memory."""
    frame = pl.DataFrame(rows)
    small, large = (frame.filter(pl.col("rows") == n).sort("format") for n in ROWS)
    ratios = dict(zip(small["format"], large["peak_mib"] / small["peak_mib"], strict=True))
    lines = [
        "# Peak memory of `encode`",
        "",
        f"`python bench/encode_memory.py`: {len(CARDINALITIES)} string fields, {sum(CARDINALITIES):,} distinct values",
        "in every log, one thread, one process per line. `import` is the process before it reads a row. The limit is",
        f"{LIMIT} times the memory for ten times the rows.",
        "",
        "| raw log | rows | table rows | import MiB | peak MiB | seconds | peak / peak of 10^6 rows |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in frame.sort("format", "rows").iter_rows(named=True):
        ratio = f"{ratios[row['format']]:.2f}" if row["rows"] == ROWS[1] else ""
        lines.append(
            f"| {row['format']} | {row['rows']:,} | {row['table_rows']:,} | {row['import_mib']:.0f} "
            f"| {row['peak_mib']:.0f} | {row['seconds']:.1f} | {ratio} |"
        )
    (RESULTS / "encode_memory.md").write_text("\n".join(lines) + "\n")
    if max(ratios.values()) > LIMIT:
        raise SystemExit(f"peak memory grew {max(ratios.values()):.2f} times, at most {LIMIT} is promised")


if __name__ == "__main__":
    main()
