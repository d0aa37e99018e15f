"""Record what this checkout makes of the laboratory's data, and compare two records: has a change of the tree a trace?

    python bench/pins.py record BEFORE.json
    python bench/pins.py compare BEFORE.json AFTER.json

``record`` writes down, on the data sets of the exams (:class:`pocketrec.testing.Lab`, heads of a few units):

``files``
    of the file of every method with every backbone (fp32 at 70 %, and for the backbones of
    ``tests/methods/test_product.py`` also int8 at 50 % with the direct index, rankers baked): SHA-256 of the whole
    file, of its arrays by name, of the decoded weight matrix and of the scores. A change of the format alone changes
    the first two and not the last two.
``configurations``
    the JSON configuration of every method, backbone and source with its defaults, and of a training.
``verbs``
    exit code, ``--json`` document and last words of every verb, good and bad calls; times, paths and versions are
    replaced by their names.
``help``
    the ``--help`` of every verb, and of every plug-in that gives a verb its flags.
``study``
    the journal of the shipped smoke study, without times.

The settings are small: one epoch for what trains, 600 clicks, 30 users; one to two minutes on one core. Trained numbers
are compared on one machine and one installation only: they differ from processor to processor. ``compare`` prints what
differs, and leaves with 1 if anything does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.update(COLUMNS="120", OMP_NUM_THREADS="1")

import numpy as np
import torch

import pocketrec as pr
from pocketrec import cli, registry
from pocketrec.registry import Axis
from pocketrec.testing import Lab

AXES: tuple[Axis, ...] = ("sources", "backbones", "methods")
PRODUCT = ("deepfm", "dcn_mix", "neumf", "lightgcn")
"""Backbones of ``tests/methods/test_product.py``."""

TRAINING = {"epochs": 1, "batch_size": 256, "learning_rate": 1e-2}
TIMES = re.compile(
    r"seconds|latency|memory|rss|machine|_us$|_ms$|^ms$|per_second|load|started|ended|host|time|cpu|peak"
)
"""Names of what differs from one call to the next."""

VERBS = ("train", "compress", "measure", "recommend", "inspect", "bench", "report", "demo", "encode")
CALLS = """
encode synthetic {clicks} --rows 4000 --cardinalities 200,50,5 --hashed --json
encode synthetic {other} --rows 300 --cardinalities 200,50,5
encode interactions pairs.csv {visits} --json
encode interactions nowhere.csv {nothing} --json
encode synthetic {nothing} --rows none
encode synthetik {nothing}
encode table broken.csv {nothing} --json
train {clicks} --run {run} --epochs 2 --batch-size 256 --hidden 16,8 --json
train {clicks} --run {run} --epochs 2 --batch-size 256 --hidden 16,8 --json
train {clicks} --run {run} --epochs 3 --batch-size 128 --hidden 16 --json
train {clicks} --run {table} --backbone fm --epochs 1
train {visits} --run {ranks} --backbone lightgcn --epochs 2 --batch-size 256 --json
train {visits} --run {nothing} --backbone deepfm --json
train {clicks} --run {nothing} --epochs -1
compress {run} --budget 50% --budget sparsity=0.9 --out {files} --method shaver --json
compress {run} --budget 50% --out {files} --method mag_prune --index direct --storage fp16
compress {run} --budget 12000B --out {files} --method rate_distortion --json
compress {ranks} --budget 50% --out {files} --method ptq --bake --json
compress {ranks} --budget 50% --out {files} --method qr --json
compress {run} --budget 1B --out {files} --json
compress {run} --budget much --out {files} --json
compress {run} --budget 50% --out {files} --method magprune
compress {nothing} --budget 50% --out {files} --json
measure {files}/shaver-50pct.safetensors --data {clicks} --json
measure {files}/rate_distortion-12000B.safetensors --data {clicks} --split valid --json
measure {files}/ptq-50pct.safetensors --data {visits} -k 5 --json
measure {run} --data {clicks} --json
measure {ranks} --data {visits} --json
measure {files}/shaver-50pct.safetensors --data {visits} --json
measure {nothing} --data {clicks} --json
recommend {files}/ptq-50pct.safetensors --user 3 -k 5 --json
recommend {files}/ptq-50pct.safetensors --user 3 -k 5 --exclude 1,2 --json
recommend {files}/ptq-50pct.safetensors --user 999 -k 3 --json
recommend {files}/shaver-50pct.safetensors --user 3 --json
inspect {clicks} --verify --json
inspect {visits}
inspect {run} --json
inspect {files}/shaver-50pct.safetensors --verify --json
inspect {files}/qr-50pct.safetensors --json
inspect {files} --json
inspect broken.csv --json
bench smoke --out {study} --dry-run --json
bench smoke --out {study} --threads 1 --json
report {study} --json
bench nosuch --out {nothing} --json
report {nothing} --json
boil --json
--version
"""
Record = dict[str, Any]


def digest(*parts: bytes | np.ndarray) -> str:
    """A short SHA-256 of parts behind each other."""
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return hasher.hexdigest()[:20]


def method_of(name: str) -> Any:
    """The method at its defaults."""
    return registry.load("methods", name)()


def product(lab: Lab, folder: Path) -> Record:
    """Every method with every backbone, as files."""
    run, cells = pr.Run(None, training=pr.Training(**TRAINING)), {}
    for method in registry.modules("methods"):
        for backbone in lab.backbones:
            settings: dict[str, Mapping[str, Any]] = {"70% fp32": {"storage": "fp32"}}
            if backbone.name in PRODUCT:
                bake = backbone.task == "cf" and not registry.load("methods", method).trains
                settings["50% int8 direct"] = {"storage": "int8", "index": "direct", "bake": bake}
            for label, how in settings.items():
                cell = f"{method} {backbone.name} {label}"
                cells[cell] = made(lab, backbone, method, label.split()[0], how, folder, run)
    return cells


def made(lab: Lab, backbone: Any, method: str, budget: str, how: Mapping[str, Any], folder: Path, run: Any) -> Record:
    """One file and what it says; or why there is none."""
    data, path = lab.data(backbone.task), folder / "made.safetensors"
    try:
        small = pr.compress(lab.model(backbone), data, method_of(method), budget, run=run, **how)
        sizes = small.save(path)
    except pr.PocketRecError as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    said = decoded(path, data)
    return {"file": digest(path.read_bytes()), "bytes": sizes, "arrays": arrays(path), "scores": scored(small), **said}


def arrays(path: Path) -> Record:
    """Of each array in a safetensors file, its type, shape and digest."""
    content = path.read_bytes()
    payload = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:payload])
    found = {}
    for name, entry in entries.items():
        if name != "__metadata__":
            start, stop = (payload + offset for offset in entry["data_offsets"])
            found[name] = f"{entry['dtype']} {entry['shape']} {digest(content[start:stop])}"
    return found


def decoded(path: Path, data: pr.Dataset) -> Record:
    """Digests of the table as the file's reader decodes it, and of the scores that it gives."""
    reader, fields = pr.open(path), data.schema.field_of_row
    rows = reader.artifact.vocabulary.file_rows(data.hashes)
    found = [reader.artifact.packed.lookup(rows[fields == f][:, None], np.array([f])) for f in np.unique(fields)]
    said: Record = {"kind": reader.kind, "weights": digest(*found)}
    if reader.kind != "ego":
        said["read scores"] = digest(reader.logits(rows[np.array(data.valid.ids[:50])]))
    return said


@torch.no_grad()
def scored(small: Any) -> str:
    """Digest of the scores of the compressed model in memory."""
    model, data = small.model.eval(), small.data
    if data.schema.task == "ctr":
        return digest(model(torch.from_numpy(np.array(data.valid.ids, np.int64))).numpy())
    users, items = model.propagate(model.table.weight()).tensor_split([data.schema.fields[0].size])
    return digest(model.scores(users, items).numpy())


def configurations() -> Record:
    """Name and settings of every plug-in as JSON."""
    found: Record = {"training": {task: settings(pr.Training.default(task)) for task in ("ctr", "cf")}}
    for axis in AXES:
        for name in registry.modules(axis):
            plugin = registry.load(axis, name)()
            found[f"{axis} {name}"] = plugin.config() if hasattr(plugin, "config") else settings(plugin)
    return json.loads(json.dumps(found))


def settings(value: Any) -> Record:
    """The fields of a dataclass."""
    return dataclasses.asdict(value)


def called(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def plain(value: Any, folder: Path) -> Any:
    """A document without what differs from call to call: times, places and versions become their names."""
    if isinstance(value, dict):
        return {k: f"<{k}>" if TIMES.search(k) else plain(v, folder) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v, folder) for v in value]
    if isinstance(value, str):
        return value.replace(str(folder), "<folder>").replace(pr.__version__, "<version>")
    return value


def verbs(folder: Path) -> Record:
    """Every call of the command: its exit code and document, or its first and last words where there is none."""
    (folder / "pairs.csv").write_text("user,item\n" + "".join(f"{i % 12},{i * 7 % 17}\n" for i in range(190)))
    (folder / "broken.csv").write_bytes(bytes(range(256)))
    places = {n: n for n in ("clicks", "other", "visits", "run", "table", "ranks", "files", "study", "nothing")}
    found = {}
    for number, line in enumerate(CALLS.strip().splitlines()):
        code, out, err = called(line.format(**places).split())
        said: Any = plain(out.strip(), folder)
        if "--json" in line and not code:
            said = plain(json.loads(out), folder)
        elif not code:
            said = re.sub(r"(?<=seconds)\s+\S+|\b[0-9.]+ ?(s|ms|us|min)\b", "<time>", said)
        last = err.strip().splitlines()[-1:] if code else []
        found[f"{number:02d} {line}"] = {"code": code, "out": said, "error": plain(last, folder)}
    return found


def helps() -> Record:
    """``--help`` of all verbs, and of the verbs with each plug-in's flags."""
    calls = [["--help"], *([verb, "--help"] for verb in VERBS)]
    calls += [["encode", name, "--help"] for name in registry.modules("sources")]
    calls += [["train", "--backbone", name, "--help"] for name in registry.modules("backbones")]
    calls += [["compress", "--method", name, "--help"] for name in registry.modules("methods")]
    found = {}
    for arguments in calls:
        code, out, err = called(arguments)
        found[" ".join(arguments)] = {"code": code, "out": out.splitlines(), "error": err}
    return found


def study(folder: Path) -> Record:
    """The records of the smoke study by kind and key, and the figures of its report without times."""
    found = {}
    for number, line in enumerate((folder / "study" / "journal").read_text().splitlines()):
        record = json.loads(line.partition(" ")[2])
        found[f"{number:03d} {record['kind']} {record.get('method', '')}"] = plain(record, folder)
    names = sorted(p.relative_to(folder / "study").as_posix() for p in (folder / "study" / "report").rglob("*"))
    return {"journal": found, "report": names}


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in ``folder``, which the command's documents name."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def record() -> Record:
    """Everything, of this checkout."""
    source = Path(pr.__file__ or "").resolve()
    if not source.is_relative_to(Path(__file__).resolve().parent.parent):
        raise SystemExit(f"expected the package of this checkout, but got {source}; set PYTHONPATH=src")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        with inside(folder):
            found = {"files": product(Lab(folder / "lab"), folder), "configurations": configurations(), "help": helps()}
            found["verbs"] = verbs(folder)
            found["study"] = study(folder)
    return found


def leaves(document: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a document with its path."""
    if isinstance(document, dict) and document:
        for key, value in document.items():
            yield from leaves(value, f"{path} / {key}" if path else key)
    else:
        yield path, document


def differences(one: Record, other: Record) -> list[str]:
    """Lines on what is in one record and not, or otherwise, in the other."""
    before, after = dict(leaves(one)), dict(leaves(other))
    lines = [f"- {path}: {before[path]}" for path in before if path not in after]
    lines += [f"+ {path}: {after[path]}" for path in after if path not in before]
    for path in before.keys() & after.keys():
        if before[path] != after[path]:
            lines += [f"! {path}:\n    {before[path]}\n    {after[path]}"]
    return sorted(lines)


def summary(one: Record, other: Record) -> str:
    """How many files differ, and in what."""
    whats = ("file", "bytes", "arrays", "weights", "read scores", "scores", "kind", "refused")
    before, after = one["files"], other["files"]
    both = before.keys() & after.keys()
    counts = {what: sum(before[c].get(what) != after[c].get(what) for c in both) for what in whats}
    return f"{len(both)} files in both; differing in " + ", ".join(f"{what}: {n}" for what, n in counts.items())


def main() -> None:
    """Record, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("record").add_argument("out", type=Path)
    compare = actions.add_parser("compare")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "record":
        arguments.out.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n")
        return
    before, after = (json.loads(path.read_text()) for path in (arguments.before, arguments.after))
    lines = differences(before, after)
    print("\n".join([*lines, summary(before, after), f"{len(lines)} differences"]))
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
