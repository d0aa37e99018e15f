"""Which faults the tests notice: one line of the code changed at a time, and the tests that run it.

``record`` runs the suite once under coverage and notes which tests run which line, and how long each takes. ``check``
draws ``--sample`` changes from the storeys below, seeded: a comparison, an operator, a number, a condition turned round
or a statement left out; for each it runs the tests that reach the line, quickest first, in a forked process that reads
a changed copy of the package. A change is noticed where a test fails, or runs out of time. Lines that no test reaches
are drawn like all others, and count as not noticed.

    python bench/mutants.py record --out .mutants
    python bench/mutants.py check --out .mutants --sample 200
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pocketrec"
STOREYS = ("format", "families/coding", "files.py")
RESULT = ROOT / "bench" / "results" / "mutants.md"
MOST_TESTS = 40
"""Tests run for a change, at most."""

LIMIT_SECONDS = 900
"""How long the tests of a change may take."""

COMPARED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
OPERATED = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.FloorDiv: ("//", "*"),
    ast.Div: ("/", "*"),
    ast.Mod: ("%", "//"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
DELETED = (ast.AugAssign, ast.Raise)


@dataclass(frozen=True)
class Mutant:
    """One line, changed."""

    file: str
    line: int
    before: str
    after: str


def mutants(path: Path) -> Iterator[Mutant]:
    """Every change of a file that this script knows."""
    lines = path.read_text(encoding="utf-8").splitlines()
    tree = ast.parse("\n".join(lines))
    name = path.relative_to(PACKAGE).as_posix()
    skipped = _words(tree)
    for node in ast.walk(tree):
        if id(node) in skipped or not isinstance(node, ast.expr | ast.stmt) or node.lineno != node.end_lineno:
            continue
        line = lines[node.lineno - 1]
        if not line.isascii():
            continue
        for after in _changes(node, line):
            if after != line and _parses(lines, node.lineno, after):
                yield Mutant(name, node.lineno, line, after)


def _words(tree: ast.Module) -> set[int]:
    """Nodes that say something instead of doing it: annotations, docstrings, texts of errors, constants of modules."""
    said: list[ast.AST] = []
    for node in ast.walk(tree):
        said += [node.returns] if isinstance(node, ast.FunctionDef) and node.returns else []
        said += [node.annotation] if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation else []
        said += [node] if isinstance(node, ast.JoinedStr) else []
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            said.append(node)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            said += node.exc.args
    return {id(child) for node in said for child in ast.walk(node)}


def _changes(node: ast.AST, line: str) -> Iterator[str]:
    """The line with the node changed."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
        left, right = node.left.end_col_offset or 0, node.comparators[0].col_offset
        yield f"{line[:left]} {COMPARED[type(node.ops[0])]} {line[right:]}"
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATED:
        old, new = OPERATED[type(node.op)]
        left, right = node.left.end_col_offset or 0, node.right.col_offset
        yield line[:left] + line[left:right].replace(old, new, 1) + line[right:]
    elif isinstance(node, ast.BoolOp):
        left, right = node.values[0].end_col_offset or 0, node.values[1].col_offset
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        yield line[:left] + line[left:right].replace(old, new, 1) + line[right:]
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield line[: node.col_offset] + str(node.value + 1) + line[node.end_col_offset or 0 :]
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield line[: node.col_offset] + str(not node.value) + line[node.end_col_offset or 0 :]
    elif isinstance(node, ast.IfExp):
        test = node.test
        end = test.end_col_offset or 0
        yield f"{line[: test.col_offset]}not ({line[test.col_offset : end]}){line[end:]}"
    elif isinstance(node, DELETED) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield line[: node.col_offset] + "pass"


def _parses(lines: Sequence[str], number: int, after: str) -> bool:
    try:
        ast.parse("\n".join([*lines[: number - 1], after, *lines[number:]]))
    except SyntaxError:
        return False
    return True


def record(out: Path, workers: int) -> None:
    """Run the suite under coverage."""
    out.mkdir(parents=True, exist_ok=True)
    settings = out / "coveragerc"
    sources = "\n    ".join(str(PACKAGE / storey) + ("" if storey.endswith(".py") else "/*") for storey in STOREYS)
    settings.write_text(f"[run]\ndata_file = {out / 'coverage'}\ninclude =\n    {sources}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-n", str(workers), "--dist", "worksteal", "--timeout", "3600"]
    command += ["--cov", "--cov-config", str(settings), "--cov-context", "test", "--cov-report", ""]
    subprocess.run([*command, "--junitxml", str(out / "tests.xml")], cwd=ROOT, check=True)


def reached(out: Path) -> dict[tuple[str, int], list[str]]:
    """Which tests run a line, quickest first."""
    seconds = _seconds(out / "tests.xml")
    tests: dict[tuple[str, int], set[str]] = {}
    with sqlite3.connect(out / "coverage") as store:
        rows = store.execute(
            "select file.path, context.context, line_bits.numbits from line_bits "
            "join file on file.id = file_id join context on context.id = context_id where context.context != ''"
        )
        for path, context, bits in rows:
            name, test = Path(path).relative_to(PACKAGE).as_posix(), context.partition("|")[0]
            for number in _numbers(bits):
                tests.setdefault((name, number), set()).add(test)
    return {place: sorted(found, key=lambda t: seconds.get(t, 1e9)) for place, found in tests.items()}


def _numbers(bits: bytes) -> Iterator[int]:
    return (8 * i + j for i, byte in enumerate(bits) for j in range(8) if byte >> j & 1)


def _seconds(report: Path) -> dict[str, float]:
    """How long each test took, by its name on the command line."""
    cases = ET.parse(report).getroot().iter("testcase")  # noqa: S314 - our own file
    return {
        f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(case.get("time", 0))
        for case in cases
    }


@dataclass
class Trial:
    """A change under test, in a process of its own."""

    mutant: Mutant
    place: Path
    process: int
    until: float

    @classmethod
    def start(cls, mutant: Mutant, tests: Sequence[str], place: Path) -> Trial:
        """Run tests in a fork that has torch and numpy loaded already, so that a change takes seconds."""
        shutil.copytree(PACKAGE, place / "pocketrec", ignore=shutil.ignore_patterns("__pycache__"))
        file = place / "pocketrec" / mutant.file
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        lines[mutant.line - 1] = mutant.after + "\n"
        file.write_text("".join(lines), encoding="utf-8")
        child = os.fork()
        if child == 0:
            _run(place, tests)
        return cls(mutant, place, child, time.monotonic() + LIMIT_SECONDS)

    def outcome(self) -> bool | None:
        """Whether a test failed or ran out of time; ``None`` while they run."""
        ended, status = os.waitpid(self.process, os.WNOHANG)
        if not ended and time.monotonic() < self.until:
            return None
        if not ended:
            os.killpg(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        shutil.rmtree(self.place, ignore_errors=True)
        return not ended or status != 0


def _run(place: Path, tests: Sequence[str]) -> NoReturn:
    """The forked process: the suite's own settings, the changed package."""
    os.setsid()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = str(place)
    sys.path.insert(0, str(place))
    options = ["-x", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", "--timeout", str(LIMIT_SECONDS)]
    os._exit(int(pytest.main([*options, "-m", "nightly or not nightly", *tests]) != 0))


def check(out: Path, sample: int, seed: int, workers: int) -> float:
    """Draw changes, try each, write the page; the share that was noticed."""
    for package in ("numpy", "torch", "hypothesis"):
        import_module(package)
    files = [p for s in STOREYS for p in ([PACKAGE / s] if s.endswith(".py") else sorted((PACKAGE / s).rglob("*.py")))]
    known = [mutant for path in files for mutant in mutants(path)]
    drawn = random.Random(seed).sample(known, min(sample, len(known)))
    tests = reached(out)
    scratch = out / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    outcomes: dict[Mutant, bool] = {}
    waiting, running = list(enumerate(drawn)), []
    while waiting or running:
        while waiting and len(running) < workers:
            number, mutant = waiting.pop(0)
            if here := tests.get((mutant.file, mutant.line), [])[:MOST_TESTS]:
                running.append(Trial.start(mutant, here, scratch / str(number)))
            else:
                outcomes[mutant] = False
        for trial in list(running):
            if (outcome := trial.outcome()) is not None:
                running.remove(trial)
                outcomes[trial.mutant] = outcome
                word = "noticed" if outcome else "MISSED "
                print(f"{word} {trial.mutant.file}:{trial.mutant.line} {trial.mutant.after.strip()}", flush=True)
        time.sleep(0.05)
    results = [outcomes[mutant] for mutant in drawn]
    _write(drawn, results, len(known), seed)
    return sum(results) / len(results)


def _write(drawn: Sequence[Mutant], outcomes: Sequence[bool], known: int, seed: int) -> None:
    rows = []
    for storey in STOREYS:
        mine = [o for m, o in zip(drawn, outcomes, strict=True) if m.file.startswith(storey)]
        rows.append(f"| `{storey}` | {len(mine)} | {sum(mine)} | {100 * sum(mine) / max(1, len(mine)):.1f} % |")
    total = sum(outcomes)
    rows.append(f"| all | {len(outcomes)} | {total} | {100 * total / len(outcomes):.1f} % |")
    missed = [m for m, o in zip(drawn, outcomes, strict=True) if not o]
    page = [
        "# Faults that the tests notice",
        "",
        f"`python bench/mutants.py check --sample {len(drawn)} --seed {seed}`: {len(drawn)} of {known} changes of one "
        f"line, drawn at random; each meets at most {MOST_TESTS} of the tests that run its line, the quickest.",
        "",
        "| storey | changes | noticed | share |",
        "| --- | ---: | ---: | ---: |",
        *rows,
        "",
        "Not noticed:",
        "",
        *(f"- `{m.file}:{m.line}`: `{m.before.strip()}` -> `{m.after.strip()}`" for m in missed),
        "",
    ]
    RESULT.write_text("\n".join(page), encoding="utf-8")


def main() -> None:
    """Read the flags; the exit code is 1 where less than ``--least`` was noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["record", "check"])
    parser.add_argument("--out", type=Path, default=ROOT / ".mutants")
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--least", type=float, default=0.9)
    given = parser.parse_args()
    out = given.out.resolve()
    if given.verb == "record":
        record(out, given.workers)
    elif (share := check(out, given.sample, given.seed, given.workers)) < given.least:
        sys.exit(f"{share:.1%} noticed; at least {given.least:.0%} were expected")


if __name__ == "__main__":
    main()
