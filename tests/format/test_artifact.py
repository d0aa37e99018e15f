"""Any bytes are an artifact or an :class:`ArtifactError`; no flipped bit is ever used; sizes are exact."""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import artifact_cases
import numpy as np
import pytest
from artifact_cases import Case, click, parts, put, ranking, signed
from safetensors import safe_open
from safetensors.numpy import load_file

import pocketrec
from pocketrec import files, runtime
from pocketrec.errors import ArtifactError, ConfigError, StorageError, UnsupportedOp
from pocketrec.format import arrays
from pocketrec.format.artifact import CHUNK, FORMAT, Artifact, Contents
from pocketrec.format.block import PackedRange
from pocketrec.format.packed import Packed
from pocketrec.format.program import Op, Program
from pocketrec.format.vocabulary import Vocabulary, hash64
from pocketrec.schema import Field, Schema


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "golden.safetensors"
    click().contents.write(path)
    return path


def use(artifact: Artifact) -> None:
    """Build every part, as scoring does."""
    _ = artifact.vocabulary, artifact.packed, artifact.program


def child() -> dict[str, str]:
    """The environment of a process that imports this package and the cases."""
    folders = [Path(pocketrec.__file__).parents[1], Path(artifact_cases.__file__).parent]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ArtifactError:
        return True
    return False


# ---- what is written is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [0.0, 1.0, -1 / 3, 1.1754944e-38, 3.4e38])
def test_the_size_of_a_file_does_not_hang_on_what_is_learned(tmp_path: Path, bias: float) -> None:
    contents = click().contents
    *ops, last = contents.program.ops
    learned = [replace(op, tensors=op.tensors | {"bias": np.array(bias, np.float32)}) if op.output == "wide" else op
               for op in ops]  # fmt: skip
    other = replace(contents, program=Program((*learned, last)))
    assert other.write(tmp_path / "a") == contents.sizes()
    assert Artifact(tmp_path / "a").program.ops[-2].tensors["bias"] == np.float32(bias)


def test_a_number_of_an_earlier_format_is_read_from_the_header(golden: Path) -> None:
    """Files of format 1 have a learned number among the attributes of its op, in JSON."""
    meta, entries, payload = parts(golden)
    now, vectors = click().contents.program, np.ones((3, 2, 5), np.float32)
    (place,) = (i for i, op in enumerate(meta["head"]) if op["output"] == "wide")
    entry = entries.pop(f"head.{place}.bias")
    start, stop = entry["data_offsets"]
    for other in entries.values():
        if other["data_offsets"][0] >= stop:
            other["data_offsets"] = [n - (stop - start) for n in other["data_offsets"]]
    meta["head"][place] |= {"attributes": {"bias": 0.1}, "tensors": []}
    put(golden, signed(meta | {"format": 1}, entries, payload[:start] + payload[stop:]))
    before = Artifact(golden).program
    assert [dict(op.attributes) for op in before.ops] == [dict(op.attributes) for op in now.ops]
    np.testing.assert_allclose(before(vectors), now(vectors) - 0.15, rtol=1e-6)


def test_blank_bytes_take_the_place_of_digits(tmp_path: Path) -> None:
    one, other = (replace(click().contents, info={"n": n}, blank=9 - len(str(n))) for n in (7, 123456789))
    assert one.write(tmp_path / "one") == other.write(tmp_path / "other") == one.sizes()
    assert [Artifact(tmp_path / name).info["n"] for name in ("one", "other")] == [7, 123456789]
    with safe_open(tmp_path / "one", "numpy") as file:
        assert len(file.keys()) == len(one._arrays())


@pytest.mark.parametrize(
    "case", [click(), click(200, 50, 4, "fp16"), click(0, 1, 1, "fp32"), ranking(), ranking(kind="ego")]
)
def test_contents_come_back_equal(tmp_path: Path, case: Case) -> None:
    contents = case.contents
    written = contents.write(tmp_path / "a")
    artifact = Contents.open(tmp_path / "a")
    assert artifact.kind == contents.kind
    assert artifact.schema == contents.schema
    assert artifact.info == contents.info
    assert artifact.vocabulary.to_json() == contents.vocabulary.to_json()
    assert artifact.packed.meta() == contents.packed.meta()
    assert artifact.program.to_json() == contents.program.to_json()
    for mine, other in [
        (artifact.vocabulary.arrays(), contents.vocabulary.arrays()),
        (artifact.packed.arrays(), contents.packed.arrays()),
        (artifact.program.tensors(), contents.program.tensors()),
    ]:
        assert set(mine) == set(other)
        assert all(mine[name].tobytes() == other[name].tobytes() for name in mine)
    artifact.verify()
    sizes = contents.sizes()
    assert written == sizes == artifact.sizes()
    assert sizes["file"] == (tmp_path / "a").stat().st_size
    assert sizes["file"] == sizes["table"] + sizes["vocabulary"] + sizes["head"] + sizes["header"]
    assert sizes["table"] == contents.packed.size_bytes
    assert sizes["vocabulary"] == contents.vocabulary.size_bytes
    assert set(artifact.describe()) == {"kind", "format", "digest", "bytes", "fields", "info"}


def test_other_readers_see_one_metadata_key_and_the_same_arrays(golden: Path) -> None:
    with safe_open(golden, "numpy") as peer:
        assert list(peer.metadata()) == ["pocketrec"]
    arrays = load_file(golden)
    packed = Artifact(golden).packed.arrays()
    assert {f"table.{name}" for name in packed} <= set(arrays)
    assert all((arrays[f"table.{name}"] == array).all() for name, array in packed.items())


def test_the_digest_is_the_sha256_with_its_digits_zeroed(golden: Path) -> None:
    content = golden.read_bytes()
    digest = Artifact(golden).digest
    header = json.loads(
        json.loads(content[8 : content.index(b'"head.')].rstrip(b",") + b"}")["__metadata__"]["pocketrec"]
    )
    zeroed = content.replace(digest.encode(), b"0" * 64).replace(header["checks"]["header"].encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == digest


def test_the_same_contents_are_the_same_bytes_in_every_process(golden: Path, tmp_path: Path) -> None:
    code = "import sys; from artifact_cases import click; click().contents.write(sys.argv[1])"
    for seed in range(3):
        path = tmp_path / str(seed)
        environment = child() | {"PYTHONHASHSEED": str(seed)}
        subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=True)
        assert path.read_bytes() == golden.read_bytes()


def test_many_chunks_are_checked_where_they_are_used(tmp_path: Path) -> None:
    case = click(40_000, 5, 16, "fp32")
    path = tmp_path / "a"
    sizes = case.contents.write(path)
    assert sizes["file"] > CHUNK
    extents, _, payload = arrays.parse_header(arrays.map_file(path), path)
    values = extents["table.embedding.values"]
    content = bytearray(path.read_bytes())
    content[payload + values.stop - 1] ^= 1
    path.write_bytes(content)
    artifact = Artifact(path)
    with pytest.raises(ArtifactError, match="damaged in the 1,048,576 bytes"):
        _ = artifact.packed
    with pytest.raises(ArtifactError, match="SHA-256"):
        artifact.verify()


def test_sizes_are_told_without_a_copy_or_a_digest_of_the_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    contents = click(100_000, 5, 16, "int8").contents
    expected = contents.sizes()

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(hashlib, "sha256", refuse)
    tracemalloc.start()
    assert contents.sizes() == expected
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < expected["table"] // 10


def test_info_that_is_not_json_is_a_config_error(tmp_path: Path) -> None:
    contents = click().contents
    broken = Contents(
        "ctr", contents.schema, contents.vocabulary, contents.packed, contents.program, {"x": float("nan")}
    )
    with pytest.raises(ConfigError, match="JSON"):
        broken.write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = golden.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        click(seed=1).contents.write(golden)
    assert golden.read_bytes() == before
    assert [p.name for p in golden.parent.iterdir()] == [golden.name]


# ---- damage ------------------------------------------------------------------------------------------------------


def test_every_truncation_and_every_extension_is_refused(golden: Path) -> None:
    content = golden.read_bytes()
    for length in range(len(content) - 1, -1, -1):
        os.truncate(golden, length)
        assert refused(lambda: Artifact(golden)), length
    for tail in (b"\0", b" ", content):
        put(golden, content + tail)
        assert refused(lambda: Artifact(golden))


def test_every_flipped_bit_is_refused_before_its_byte_is_used(golden: Path) -> None:
    content = golden.read_bytes()
    digest = Artifact(golden).digest.encode()
    own_digits = range(content.index(digest), content.index(digest) + 64)
    with golden.open("r+b", buffering=0) as file:
        for position, byte in enumerate(content):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                if position in own_digits:
                    assert refused(lambda: Artifact(golden).verify()), (position, bit)
                else:
                    assert refused(lambda: use(Artifact(golden))), (position, bit)
            os.pwrite(file.fileno(), bytes([byte]), position)
    Artifact(golden).verify()


def test_verify_refuses_flipped_bits_of_the_payload(golden: Path) -> None:
    content = golden.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    with golden.open("r+b", buffering=0) as file:
        for position in range(start, len(content)):
            os.pwrite(file.fileno(), bytes([content[position] ^ 1]), position)
            with pytest.raises(ArtifactError, match="SHA-256"):
                Artifact(golden).verify()
            os.pwrite(file.fileno(), content[position : position + 1], position)


def test_swapped_blocks_are_refused(golden: Path) -> None:
    content = golden.read_bytes()
    blocks = [slice(i, i + 16) for i in range(0, len(content) - 15, 16)]
    pairs = [(a, b) for a in blocks for b in blocks if a.start < b.start and content[a] != content[b]]
    generator = np.random.default_rng(0)
    for index in generator.permutation(len(pairs))[:1500]:
        first, second = pairs[index]
        swapped = bytearray(content)
        swapped[first], swapped[second] = content[second], content[first]
        put(golden, swapped)
        assert refused(lambda: Artifact(golden).verify()), (first, second)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", b"\x80\x02.")
    canary = tmp_path / "canary"
    hostile = b"\x80\x04cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    plain = tmp_path / "plain"
    arrays.save_arrays(plain, {"x": np.arange(3)}, {"format": "pt"})
    foreign = {
        "pickle": hostile,
        "old pickle": hostile[2:],
        "torch archive": archive.getvalue(),
        "npy": b"\x93NUMPY\x01\x00" + b" " * 200,
        "gguf": b"GGUF\x03\0\0\0" + b"\0" * 200,
        "text": b"user,item,label\n" * 20,
        "nothing": b"",
        "safetensors": plain.read_bytes(),
    }
    for name, content in foreign.items():
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        assert refused(lambda p=path: Artifact(p)), name
    assert not canary.exists()
    with pytest.raises(StorageError):
        Artifact(tmp_path)
    with pytest.raises(StorageError):
        Artifact(tmp_path / "missing")


def test_a_newer_format_is_refused_politely(golden: Path) -> None:
    meta, entries, payload = parts(golden)
    put(golden, signed(meta | {"format": FORMAT + 1, "more": [1]}, entries, payload))
    with pytest.raises(ArtifactError, match="written by a newer version"):
        Artifact(golden)


# ---- liars with the right digests --------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64 + 1, -(2**70), 10**400, 0.5, 1e308, "", "a", "int8", "dense", [],
    {}, [[]], [0], {"a": 1}, "x" * 300,
]  # fmt: skip


def leaves(document: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all values inside a document."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield (*way, key)
        yield from leaves(value, (*way, key))


def changed(document: Any, way: tuple[Any, ...], value: Any) -> Any:
    """A copy of the document with one value replaced."""
    result = copy.deepcopy(document)
    inner = result
    for key in way[:-1]:
        inner = inner[key]
    inner[way[-1]] = value
    return result


def survives(path: Path) -> None:
    """Open, verify, score and recommend: an answer or a typed error, nothing else."""
    try:
        model = runtime.open(path)
        model.artifact.verify()
        model.artifact.describe()
        fields = model.schema.fields
        rows = {f.name: column for f, column in zip(fields, COLUMNS * len(fields), strict=False)}
        assert model.score_many(rows).shape == (36,)
        assert len(model.recommend(1, k=3, exclude=[101])) <= 3
    except (ArtifactError, UnsupportedOp):
        return


COLUMNS = [[f"u{u}" for u in range(6) for _ in range(6)], [9, 10, 11, 12, 13, None] * 6]


@pytest.mark.parametrize("case", [click(), ranking()])
def test_signed_lies_in_the_header_end_in_an_answer_or_an_artifact_error(golden: Path, case: Case) -> None:
    case.contents.write(golden)
    meta, entries, payload = parts(golden)
    for way in leaves(meta):
        for value in HOSTILE:
            put(golden, signed(changed(meta, way, value), entries, payload))
            survives(golden)


def test_signed_lies_in_the_array_table_end_in_an_answer_or_an_artifact_error(golden: Path) -> None:
    meta, entries, payload = parts(golden)
    for way in leaves(entries):
        for value in [*HOSTILE, "F32", "U8", "BOOL", "I64", [1, 1], [8], [0, 0], [0, 4]]:
            put(golden, signed(meta, changed(entries, way, value), payload))
            survives(golden)
    for name in entries:
        put(golden, signed(meta, {k: v for k, v in entries.items() if k != name}, payload))
        survives(golden)


def test_signed_lies_in_the_payload_end_in_an_answer_or_an_artifact_error(golden: Path) -> None:
    meta, entries, payload = parts(golden)
    generator = np.random.default_rng(0)
    for _ in range(1500):
        lie = bytearray(payload)
        for position in generator.integers(0, len(lie), int(generator.integers(1, 9))):
            lie[position] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, int(generator.integers(256))])
        put(golden, signed(meta, entries, bytes(lie)))
        survives(golden)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 7),
        ("size", 0),
        ("size", 2**62),
        ("size", 5.0),
        ("offset", 1),
        ("keys", "sorted"),
        ("first", 2**63),
        ("oov", 1),
    ],
)
def test_a_schema_with_impossible_values_is_refused(golden: Path, field: str, value: Any) -> None:
    meta, entries, payload = parts(golden)
    golden.write_bytes(signed(changed(meta, ("schema", "fields", 0, field), value), entries, payload))
    with pytest.raises(ArtifactError, match="schema"):
        Artifact(golden)


def test_parts_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    small, large = click().contents, click(9, 9).contents
    path = tmp_path / "a"
    Contents("ctr", large.schema, large.vocabulary, small.packed, small.program, {}).write(path)
    with pytest.raises(ArtifactError, match="do not fit"):
        runtime.open(path).score({"user": "u0", "item": 10})
    Contents("ctr", small.schema, small.vocabulary, small.packed, Program(()), {}).write(path)
    with pytest.raises(ArtifactError, match="cannot run"):
        runtime.open(path).score({"user": "u0", "item": 10})


# ---- size --------------------------------------------------------------------------------------------------------

OPEN_SPARSE = """
import sys
from pathlib import Path
from pocketrec.format.artifact import Artifact


def most():
    # KiB of memory that the process has had at most
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


small, large = map(Path, sys.argv[1:])
Artifact(small)
before = most()
artifact = Artifact(large)
assert artifact.sizes()["file"] > 5 << 30
print(most() - before)
"""


def test_a_sparse_file_of_5_gib_opens_in_little_memory(tmp_path: Path) -> None:
    rows, width = (5 << 30) // 64, 16
    schema = Schema("cf", (Field("user", 1, 0, "dense", oov=False), Field("item", rows - 1, 1, "dense", oov=False)))
    small = ranking(1, 3, width).contents
    meta, entries, _ = parts_of(small, tmp_path)
    shift = rows * width * 4
    order = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    table = {"table.all.values": {"dtype": "F32", "shape": [rows * width], "data_offsets": [0, shift]}}
    moved = {
        name: entries[name] | {"data_offsets": [n + shift for n in entries[name]["data_offsets"]]} for name in order
    }
    size = shift + max(e["data_offsets"][1] for e in entries.values())
    meta = meta | {"schema": schema.to_json(), "vocabulary": {"attempt": 0, "keys": [1, rows - 1]}}
    header = signed_header(meta, {**table, **moved}, size)
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    command = [sys.executable, "-c", OPEN_SPARSE, str(tmp_path / "small"), str(path)]
    done = subprocess.run(command, env=child(), capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 << 10


def parts_of(contents: Contents, folder: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    contents.write(folder / "small")
    return parts(folder / "small")


def signed_header(meta: dict[str, Any], entries: dict[str, Any], size: int) -> bytes:
    """The header of a file whose payload is not looked at."""
    fake = "0" * 64 * -(-size // CHUNK)
    content = signed(meta, entries, b"")
    text = content[8:].rstrip(b" ").replace(rb"\"chunks\":\"\"", rb"\"chunks\":\"" + fake.encode() + rb"\"")
    document = json.loads(text)
    inner = json.loads(document["__metadata__"]["pocketrec"])
    zeroed = text.replace(inner["checks"]["file"].encode(), b"0" * 64).replace(
        inner["checks"]["header"].encode(), b"0" * 64
    )
    zeroed += b" " * (-len(zeroed) % 8)
    header = len(zeroed).to_bytes(8, "little") + zeroed
    digest = hashlib.sha256(header).hexdigest().encode()
    position = header.index(rb"\"header\":\"") + len(rb"\"header\":\"")
    return header[:position] + digest + header[position + 64 :]


def test_a_column_wide_table_of_one_field_fits(tmp_path: Path) -> None:
    schema = Schema("ctr", (Field("only", 4, 0),))
    weight = np.arange(8, dtype=np.float32).reshape(4, 2)
    zeros = np.zeros((1, 2), np.float32)
    texts = ["a", "b", "c"]
    vocabulary, rows = Vocabulary.build(schema, np.ones(4, bool), lambda i: hash64(texts))
    packed = Packed.encode(weight, None, zeros, zeros, (PackedRange("e", 0, 4, 0, 2),), schema.field_of_row, rows)
    Contents("ctr", schema, vocabulary, packed, Program((Op("sum", ("vectors",), "z"),)), {}).write(tmp_path / "a")
    model = runtime.open(tmp_path / "a")
    logits = [model.logits(model.artifact.vocabulary.lookup(0, [t])[:, None])[0] for t in [*texts, "d"]]
    assert logits == [1, 5, 9, 0]
