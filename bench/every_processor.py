"""The whole suite as other processors run it: every level of instructions of torch, numpy and the compiled kernel.

    python bench/every_processor.py
    python bench/every_processor.py --every -k imitation

A level is imitated by what the libraries read from the environment: ``ATEN_CPU_CAPABILITY`` (torch),
``ONEDNN_MAX_CPU_ISA`` and ``MKL_CBWR`` (its matrix products), ``OPENBLAS_CORETYPE`` (those of numpy) and
``POCKETREC_KERNEL`` (ours). By default the kernel goes with the level, and is left out once; ``--every`` takes each
with each. The last run has four busy processes beside it. What follows the options goes to pytest.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

from pocketrec.native import library

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BUSY = 4
PROCESSORS = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Prescott",
    },
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell"},
    "native": {},
}
KERNELS = ("off", "portable", "avx2", "avx512")
VARIABLES = {name for processor in PROCESSORS.values() for name in processor} | {"POCKETREC_KERNEL"}


@dataclass(frozen=True)
class Case:
    """One run of the suite; without a ``kernel`` it has the best one of the machine."""

    processor: str
    kernel: str = ""
    busy: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with the levels of the case and no others."""
        plain = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        own = {"POCKETREC_KERNEL": self.kernel} if self.kernel else {}
        return {"OMP_NUM_THREADS": "1", **plain, **PROCESSORS[self.processor], **own}


@dataclass(frozen=True)
class Outcome:
    """Counts of a run, how long it took, and what failed."""

    passed: int
    failed: int
    skipped: int
    seconds: float
    names: tuple[str, ...]


def kernels() -> tuple[str, ...]:
    """The levels of the kernel that this machine has, none first."""
    level = library.level()
    if level is None:
        return ("off",)
    known: tuple[str, ...] = library.LEVELS
    return tuple(name for name in KERNELS if name == "off" or known.index(name) <= known.index(level))


def cases(every: bool) -> list[Case]:
    """All runs, the busy one last."""
    there = kernels()
    if every:
        plain = [Case(*pair) for pair in product(PROCESSORS, there)]
    else:
        pairs = (("default", "portable"), ("avx2", "avx2"), ("native", "avx512"), ("native", "off"))
        plain = [Case(processor, level) for processor, level in pairs if level in there]
    return [*plain, Case("native", busy=BUSY)]


@contextmanager
def company(count: int) -> Iterator[None]:
    """``count`` processes that do nothing but take time."""
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in beside:
            process.kill()
            process.wait()


def run(case: Case, workers: int, arguments: list[str]) -> Outcome:
    """One run of the suite.

    Raises:
        SystemExit: pytest could not run at all.
    """
    with tempfile.TemporaryDirectory() as folder, company(case.busy):
        report = Path(folder) / "report.xml"
        spread = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
        started = time.perf_counter()
        command = [sys.executable, "-m", "pytest", *spread, "--junitxml", str(report), *arguments]
        status = subprocess.run(command, cwd=ROOT, env=case.environment, check=False).returncode
        seconds = time.perf_counter() - started
        if status not in (0, 1):
            raise SystemExit(f"pytest ended with status {status}; nothing was written.")
        return outcome(report, seconds)


def outcome(report: Path, seconds: float) -> Outcome:
    """What the report of a run says; errors of fixtures count as failures."""
    tests = list(ElementTree.parse(report).getroot().iter("testcase"))  # noqa: S314
    failed = [t for t in tests if t.find("failure") is not None or t.find("error") is not None]
    skipped = [t for t in tests if t.find("skipped") is not None]
    names = tuple(sorted({f"{t.get('classname', '')}::{t.get('name', '')}" for t in failed}))
    return Outcome(len(tests) - len(failed) - len(skipped), len(failed), len(skipped), seconds, names)


def machine() -> str:
    """The instructions that torch, numpy and the kernel find here."""
    code = (
        "import numpy, torch; from pocketrec.native import library; "
        "c = numpy.show_config(mode='dicts')['SIMD Extensions'];"
        "print(f'torch {torch.__version__} finds {torch.backends.cpu.get_cpu_capability()}, numpy {numpy.__version__}"
        ' {(c.get("found") or ["the baseline"])[-1]}, the kernel {library.level() or "none"}\')'
    )
    environment = Case("native").environment
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return f"{found.stdout.strip()}; {os.cpu_count()} cores."


def page(rows: list[tuple[Case, Outcome]], arguments: list[str]) -> str:
    """The table, and below it what failed."""
    what = f"`pytest {' '.join(arguments)}`" if arguments else "The whole suite"
    lines = [
        "# The suite on every processor",
        "",
        f"{what}; levels by environment variables, see `bench/every_processor.py`. {machine()}",
        "",
        "| processor | kernel | beside it | passed | failed | skipped | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, found in rows:
        beside = f"{case.busy} busy processes" if case.busy else "nothing"
        counts = f"{found.passed:,} | {found.failed:,} | {found.skipped:,} | {found.seconds:,.0f}"
        lines.append(f"| {case.processor} | {case.kernel or 'best'} | {beside} | {counts} |")
    failures = [f"- {c.processor}, {c.kernel or 'best'}: `{name}`" for c, found in rows for name in found.names]
    return "\n".join([*lines, *(["", *failures] if failures else [])]) + "\n"


def main() -> int:
    """Run the suite in every case and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", action="store_true", help="each processor with each level of the kernel")
    parser.add_argument("--workers", type=int, default=2, help="processes of a run")
    parser.add_argument("--out", type=Path, default=RESULTS / "every_processor.md", help="file of the table")
    settings, arguments = parser.parse_known_args()
    rows: list[tuple[Case, Outcome]] = []
    for case in cases(settings.every):
        print(f"== {case}", flush=True)
        rows.append((case, run(case, settings.workers, arguments)))
        settings.out.write_text(page(rows, arguments), encoding="utf-8")
    print(page(rows, arguments))
    return int(any(found.failed for _, found in rows))


if __name__ == "__main__":
    sys.exit(main())
