"""Files of earlier versions open and say what they said: one small artifact of each layout, kept for ever."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from pocketrec import runtime
from pocketrec.format import layouts
from pocketrec.format.artifact import FORMAT, FileKind
from pocketrec.format.block import Storage
from pocketrec.format.entries import Layout
from pocketrec.format.program import OPS
from pocketrec.native import library
from pocketrec.schema import Keys

STORED = Path(__file__).parent / "stored"
NAMES = sorted(p.name.removesuffix(".expected.safetensors") for p in STORED.glob("*.expected.safetensors"))
TOLERANCE = 1e-6
"""Of max(1, |x|), on any processor."""


@pytest.fixture(params=[*library.LEVELS, "numpy"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn (capped at what the processor has), then numpy alone."""
    if request.param == "numpy":
        monkeypatch.setattr(library, "compiled", lambda: None)
    else:
        library.limit(request.param)
    yield request.param
    library.limit(library.LEVELS[-1])


@cache
def expected(name: str) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """What the version that wrote the file read from it; see ``stored/write.py``."""
    path = STORED / f"{name}.expected.safetensors"
    with safe_open(path, "numpy") as file:
        return load_file(path), json.loads(file.metadata()["inputs"])


def opened(name: str) -> runtime.Recommender:
    return runtime.open(STORED / f"{name}.safetensors")


def near(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal within the tolerance, where NaN is no number."""
    assert found.shape == wanted.shape
    gap = np.abs(found.astype(np.float64) - wanted) / np.maximum(1, np.abs(wanted))
    assert bool((gap <= TOLERANCE).all()), f"differs by {gap.max()} of max(1, |x|)"


def vectors(recommender: runtime.Recommender, rows: np.ndarray, fields: np.ndarray) -> np.ndarray:
    """Vectors ``(R, D)`` of file rows ``(R,)``, field by field."""
    found = np.full((len(rows), recommender.artifact.packed.width), np.nan, np.float32)
    for field in np.unique(fields):
        mine = fields == field
        found[mine] = recommender.artifact.packed.lookup(rows[mine][:, None], np.array([field]))[:, 0]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_is_as_it_was_written(name):
    opened(name).artifact.verify()


@pytest.mark.parametrize("name", NAMES)
def test_raw_values_have_the_same_rows(name):
    arrays, inputs = expected(name)
    recommender = opened(name)
    vocabulary = recommender.artifact.vocabulary
    found = [vocabulary.lookup_row([row[f.name] for f in recommender.schema.fields]) for row in inputs]
    assert np.array_equal(found, arrays["rows"])
    assert (arrays["rows"] < 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_integers_are_exact(name):
    artifact = opened(name).artifact
    stored = artifact.packed.arrays() | artifact.vocabulary.arrays()
    integers = {n: a for n, a in stored.items() if np.issubdtype(a.dtype, np.integer)}
    wanted = {n.removeprefix("stored."): a for n, a in expected(name)[0].items() if n.startswith("stored.")}
    assert integers.keys() == wanted.keys()
    for array, values in wanted.items():
        assert integers[array].dtype == values.dtype
        assert np.array_equal(integers[array], values)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_the_same(name, implementation):
    arrays, _ = expected(name)
    recommender = opened(name)
    near(vectors(recommender, np.arange(len(arrays["fields"])), arrays["fields"]), arrays["vectors"])
    fields = np.arange(len(arrays["absent"]))
    near(vectors(recommender, np.full(len(fields), -1), fields), arrays["absent"])


@pytest.mark.parametrize("name", [name for name in NAMES if "scores" in expected(name)[0]])
def test_scores_are_the_same(name, implementation):
    arrays, inputs = expected(name)
    recommender = opened(name)
    near(recommender.logits(arrays["rows"]), arrays["scores"])
    scores = recommender.score_many(inputs)
    link = 1 / (1 + np.exp(-arrays["scores"].astype(np.float64))) if recommender.kind == "ctr" else arrays["scores"]
    near(scores, link)
    near(np.array([recommender.score(inputs[0])]), link[:1])


@pytest.mark.parametrize("name", [name for name in NAMES if "items" in expected(name)[0]])
def test_lists_are_the_same(name, implementation):
    """An item may change its place with one whose score is nearer than the tolerance, and with no other."""
    arrays, _ = expected(name)
    recommender = opened(name)
    for user, items, scores in zip(arrays["users"], arrays["items"], arrays["list_scores"], strict=True):
        ranked = recommender.recommend(int(user), len(items), range(int(user)))
        near(np.array([score for _, score in ranked]), scores)
        for place, (item, score) in enumerate(ranked):
            assert item == items[place] or np.abs(scores[items != items[place]] - score).min() <= 2 * TOLERANCE


@pytest.mark.parametrize("name", [name for name in NAMES if "quantised" in name])
def test_codes_of_a_few_bits_mean_low_plus_code_times_step(name):
    """Read bit by bit, by the definition of the layout."""
    arrays, _ = expected(name)
    packed = opened(name).artifact.packed
    for block in packed.blocks:
        bits, stored = block.to_json()["bits"], {n: np.asarray(a) for n, a in block.arrays.items()}
        stream = [[(byte >> i) & 1 for byte in row for i in range(8)] for row in stored["codes"].tolist()]
        codes = np.array(
            [[sum(row[c * bits + i] << i for i in range(bits)) for c in range(block.width)] for row in stream]
        )
        fields = arrays["fields"][block.start : block.stop]
        values = stored["low"][fields] + codes * stored["step"][fields].astype(np.float64)
        near(values, arrays["vectors"][block.start : block.stop, block.left : block.right])


def documents() -> list[dict[str, Any]]:
    return [block.to_json() for name in NAMES for block in opened(name).artifact.packed.blocks]


def test_every_layout_has_a_stored_artifact():
    assert {d["layout"] for d in documents()} == {*get_args(Layout), *layouts.NAMES}


def test_every_layout_of_entries_has_every_storage():
    found = {(d["layout"], d["storage"]) for d in documents() if d["layout"] in get_args(Layout)}
    assert found == {(layout, storage) for layout in get_args(Layout) for storage in get_args(Storage)}


@pytest.mark.parametrize("layout", ["product", "tensor_train", "hash_mlp", "pruned_sum"])
def test_every_layout_of_factors_has_every_storage_and_both_orders(layout):
    found = [d for d in documents() if d["layout"] == layout]
    assert {d["storage"] for d in found} == {*get_args(Storage)}
    assert {"slots" in d["arrays"] for d in found} == {True, False}


@pytest.mark.parametrize(
    ("layout", "setting", "values"),
    [
        ("product", "operation", {"mult", "add", "concat"}),
        ("pruned_sum", "operation", {None, "concat"}),
        ("hash_mlp", "code", {"uniform", "gaussian"}),
        ("hash_mlp", "end", {"linear", "mish", "mish_affine"}),
    ],
)
def test_every_setting_of_a_layout_has_a_stored_artifact(layout, setting, values):
    assert {d["settings"].get(setting) for d in documents() if d["layout"] == layout} == values


def test_every_number_of_bits_has_a_stored_artifact():
    assert {d["bits"] for d in documents() if d["layout"] == "quantised"} == set(range(2, 9))


def test_every_kind_op_and_key_has_a_stored_artifact():
    artifacts = [opened(name).artifact for name in NAMES]
    ops = [op for artifact in artifacts for op in artifact.program.ops]
    assert {artifact.kind for artifact in artifacts} == {*get_args(FileKind)}
    assert {op.kind for op in ops} == set(OPS)
    assert any(op.codes for op in ops)
    assert {f.keys for artifact in artifacts for f in artifact.schema.fields} == {*get_args(Keys)}


def test_every_format_has_stored_artifacts():
    found = [opened(name).artifact.describe()["format"] for name in NAMES]
    assert set(found) == set(range(1, FORMAT + 1))
    assert {name for name, version in zip(NAMES, found, strict=True) if version > 1} == {
        name for name in NAMES if name.startswith("format")
    }


@pytest.mark.parametrize("kind", ["sum", "dot"])
def test_a_learned_number_is_stored_in_both_ways(kind):
    """In format 1 in the header, then as an array; read, both are the same."""
    ways = set()
    for name in NAMES:
        artifact = opened(name).artifact
        for i, op in enumerate(artifact.program.ops):
            if op.kind == kind and "bias" in op.tensors:
                assert op.tensors["bias"].dtype == np.float32
                assert op.tensors["bias"].shape == ()
                assert op.tensors["bias"] != 0
                stored = f"head.{i}.bias" in load_file(artifact.path)
                assert stored == (artifact.describe()["format"] > 1)
                ways.add(stored)
    assert ways == {False, True}


def test_files_with_a_byte_budget_have_blank_places():
    for name in (n for n in NAMES if n.startswith("format2")):
        content = (STORED / f"{name}.safetensors").read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        blank = len(header) - len(header.rstrip(b" "))
        assert (blank >= 8) == (opened(name).artifact.info["budget"]["kind"] == "bytes")


def test_files_stay_small():
    sizes = [(STORED / f"{name}.safetensors").stat().st_size for name in NAMES]
    assert max(sizes) < 30_000
