"""``docs/format.md``: a reader that knows only the page reads every stored file, and refuses what must be refused.

The package has to refuse the same files.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reader
import reader_layouts
from artifact_cases import click, ranking
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from safetensors import safe_open
from safetensors.numpy import load_file
from trellis_cases import coded

from pocketrec import runtime
from pocketrec.errors import PocketRecError
from pocketrec.format import constants, program, sections
from pocketrec.format.arrays import save_arrays
from pocketrec.format.artifact import FORMAT
from pocketrec.format.layouts.transform import TransformBlock
from pocketrec.format.layouts.trellis import TrellisBlock, encode
from pocketrec.format.trellis_codes import CODES

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "format.md").read_text()
NAMES = sorted(p.name.removesuffix(".expected.safetensors") for p in HERE.glob("stored/*.expected.safetensors"))
TOLERANCE = 1e-6
"""Of max(1, |x|), on any processor."""
CONSTANTS = constants.PATH.read_bytes()


@cache
def read(name: str) -> reader.Reader:
    return reader.Reader((HERE / "stored" / f"{name}.safetensors").read_bytes(), CONSTANTS)


@cache
def expected(name: str) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    path = HERE / "stored" / f"{name}.expected.safetensors"
    with safe_open(path, "numpy") as file:
        return load_file(path), json.loads(file.metadata()["inputs"])


def near(found: Any, wanted: np.ndarray) -> None:
    found = np.asarray(found, np.float64)
    assert found.shape == wanted.shape
    gap = np.abs(found - wanted) / np.maximum(1, np.abs(wanted))
    assert (gap <= TOLERANCE).all(), gap.max()


@pytest.mark.parametrize("module", [reader, reader_layouts], ids=lambda m: m.__name__)
def test_the_reader_knows_nothing_but_the_page(module):
    tree = ast.parse(Path(module.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= {"__future__", "hashlib", "json", "numpy", "reader_layouts"}
    called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not called & {"__import__", "exec", "eval"}


@pytest.mark.parametrize("name", NAMES)
def test_digests_and_integers_are_exact(name):
    file = read(name)
    file.verify()
    wanted = {n.removeprefix("stored."): a for n, a in expected(name)[0].items() if n.startswith("stored.")}
    for array, values in wanted.items():
        found = file.array(array if array.startswith("vocabulary.") else f"table.{array}", "")
        assert found.dtype == values.dtype
        assert_array_equal(found, values)


@pytest.mark.parametrize("name", NAMES)
def test_raw_values_have_their_rows(name):
    file, (arrays, inputs) = read(name), expected(name)
    names = [field["name"] for field in file.fields]
    assert [[file.row_of(f, row[n]) for f, n in enumerate(names)] for row in inputs] == arrays["rows"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_table_is_decoded(name):
    file, (arrays, _) = read(name), expected(name)
    near([file.vector(row, f) for row, f in enumerate(arrays["fields"].tolist())], arrays["vectors"])
    near([file.vector(-1, f) for f in range(len(file.fields))], arrays["absent"])


@pytest.mark.parametrize("name", [n for n in NAMES if "scores" in expected(n)[0]])
def test_scores_come_from_raw_values(name):
    file, (arrays, inputs) = read(name), expected(name)
    near([file.logit(rows) for rows in arrays["rows"].tolist()], arrays["scores"])
    link = 1 / (1 + np.exp(-arrays["scores"].astype(np.float64))) if file.kind == "ctr" else arrays["scores"]
    near([file.score([row[f["name"]] for f in file.fields]) for row in inputs], link)


@pytest.mark.parametrize("name", [n for n in NAMES if "items" in expected(n)[0]])
def test_lists_are_the_same(name):
    """An item may change its place with one whose score is nearer than the tolerance, and with no other."""
    file, (arrays, _) = read(name), expected(name)
    for user, items, scores in zip(arrays["users"].tolist(), arrays["items"], arrays["list_scores"], strict=True):
        ranked = file.recommend(user, len(items), range(user))
        near([score for _, score in ranked], scores)
        for place, (item, score) in enumerate(ranked):
            assert item == items[place] or np.abs(scores[items != items[place]] - score).min() <= 2 * TOLERANCE


def test_vectors_before_propagation_are_not_scored():
    file = read("dense-ego-lightgcn")
    with pytest.raises(ValueError, match=r"^7\.3"):
        file.score([0, 0])


def test_a_payload_of_several_chunks_is_read(tmp_path):
    case = click(users=70_000, width=16, storage="fp32")
    sizes = case.contents.write(tmp_path / "a")
    assert sizes["file"] > 2 * reader.CHUNK
    file = reader.Reader((tmp_path / "a").read_bytes(), CONSTANTS)
    file.verify()
    known = runtime.open(tmp_path / "a")
    for user in range(0, 70_000, 7_001):
        assert file.score([f"u{user}", 11]) == pytest.approx(known.score({"user": f"u{user}", "item": 11}), abs=1e-6)


@given(coded())
@settings(max_examples=40, deadline=None)
def test_any_trellis_block_is_decoded(case):
    shape, records, width = case
    arrays = encode(shape, records)
    block = TrellisBlock("a", 0, shape.users + shape.items, 0, width, "trellis", shape, arrays=arrays)
    same_rows(block, np.zeros((1, width)))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_any_transform_block_is_decoded(seed):
    rng = np.random.default_rng(seed)
    parts, classes, codes, width = [], [], [], 5
    for rows in rng.choice([0, 1, 7, 255, 256, 257, 300], 3).tolist():
        planes = int(rng.integers(0, 4))
        count, directions = int(rng.integers(0, (1 << planes) + 1)), int(rng.integers(0, 2 * width))
        bits, scales = rng.integers(0, 9, (count, directions)), rng.uniform(0.01, 2, (count, directions))
        basis = rng.integers(-127, 128, (directions, width)).astype(np.int8)
        parts.append(sections.Section(planes, sections.coder(bits, scales), basis))
        classes.append(rng.integers(0, 1 << planes, rows))
        widths = np.vstack([bits, np.zeros((8, directions), int)])[classes[-1]]
        codes.append((rng.integers(0, 256, (rows, directions)) % (1 << widths)).astype(np.uint8))
    arrays = sections.encode(parts, classes, codes)
    same_rows(TransformBlock("a", 0, sum(map(len, classes)), 0, width, "transform", arrays=arrays), np.ones((1, 5)))


def same_rows(block, fill):
    """Both readers say the same of every row of a block, also of which rows it stores."""
    block.check(1)
    other = reader_layouts.LAYOUTS[block.layout](block.to_json(), block.arrays, 1, reader.Constants(CONSTANTS))
    found = [other.read(row, 0, fill[0]) for row in range(block.rows)]
    stored = np.flatnonzero([f is not None for f in found])
    assert_array_equal(stored, np.flatnonzero(block.positions(np.arange(block.rows)) >= 0))
    if len(stored):
        out = np.repeat(fill, len(stored), axis=0).astype(np.float32)
        block.read(stored, np.zeros(len(stored), np.int32), out)
        wanted = np.array([f for f in found if f is not None])
        assert (np.abs(out - wanted) <= 2e-6 * np.maximum(100, np.abs(wanted))).all()


def resigned(content: bytes, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> bytes:
    """The file after a change of its document and its arrays' entries, with digests that are right."""
    length = int.from_bytes(content[:8], "little")
    entries, payload = json.loads(content[8 : 8 + length]), content[8 + length :]
    document = json.loads(entries.pop("__metadata__")["pocketrec"])
    document["checks"], before = {"file": "0" * 64, "header": "0" * 64}, document["chunks"]
    payload = change(document, entries) or payload
    if document["chunks"] == before:
        parts = [payload[i : i + reader.CHUNK] for i in range(0, len(payload), reader.CHUNK)]
        document["chunks"] = "".join(hashlib.sha256(part).hexdigest() for part in parts)
    text = spelled({"__metadata__": {"pocketrec": spelled(document)}, **entries}).encode()
    blank = len(content[: 8 + length]) - len(content[: 8 + length].rstrip(b" "))
    return signed(text + b" " * (blank + -(len(text) + blank) % 8), payload)


def spelled(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def signed(text: bytes, payload: bytes) -> bytes:
    """A file with this header, whose digests are zeros."""
    header = len(text).to_bytes(8, "little") + text
    digests = [hashlib.sha256(header + payload).hexdigest(), hashlib.sha256(header).hexdigest()]
    return header[:62] + digests[0].encode() + header[126:142] + digests[1].encode() + header[206:] + payload


def put(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """A change of one value of the document; ``None`` removes it."""

    def change(document: dict[str, Any], entries: dict[str, Any]) -> None:
        *outer, last = path
        place: Any = document
        for key in outer:
            place = place[key]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return change


def entry(name: str, **new: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """A change of one array's entry."""
    return lambda document, entries: entries[name].update(new)


def moved(document: dict[str, Any], entries: dict[str, Any]) -> None:
    """Two arrays overlap: one lies a byte further on the left."""
    name = max(entries, key=lambda n: entries[n]["data_offsets"])
    start, stop = entries[name]["data_offsets"]
    entries[name]["data_offsets"] = [start - 1, stop - 1]


def renamed(document: dict[str, Any], entries: dict[str, Any]) -> None:
    entries["other.fill"] = entries.pop("table.fill")


def falling(document: dict[str, Any], entries: dict[str, Any]) -> bytes:
    """The vocabulary's directory does not rise."""
    content = bytearray(CASES["click"][HEADER:])
    start, stop = entries["vocabulary.directory"]["data_offsets"]
    content[start:stop] = np.arange((stop - start) // 4)[::-1].astype("<u4").tobytes()
    return bytes(content)


CASES = {
    "click": (HERE / "stored" / "bitmap-int8-deepfm.safetensors").read_bytes(),
    "ranking": (HERE / "stored" / "trellis-lightgcn.safetensors").read_bytes(),
    "transform": (HERE / "stored" / "transform-coded-head-deepfm.safetensors").read_bytes(),
    "product": (HERE / "stored" / "product-mult-fm.safetensors").read_bytes(),
    "quantised": (HERE / "stored" / "quantised-4-mf.safetensors").read_bytes(),
    "numbers": (HERE / "stored" / "format2-bitmap-deepfm.safetensors").read_bytes(),
}
HEADER = 8 + int.from_bytes(CASES["click"][:8], "little")
BLOCK = ("table", "blocks", 0)
FLATTEN = {"kind": "flatten", "inputs": ["vectors"], "output": "x", "attributes": {}, "tensors": []}

CHANGES: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "unknown type": ("9.3", "click", entry("table.fill", dtype="F8")),
    "a negative size": ("9.3", "click", entry("table.fill", shape=[-1, 9])),
    "a broken size": ("9.3", "click", entry("table.fill", shape=[3.0, 9])),
    "nine sizes": ("9.3", "click", entry("table.fill", shape=[1] * 9)),
    "a shape too large": ("9.3", "click", entry("table.fill", shape=[4, 9])),
    "a key too many": ("9.3", "click", entry("table.fill", more=1)),
    "overlapping ranges": ("9.4", "click", moved),
    "no format": ("9.5", "click", put(("format",), None)),
    "format 0": ("9.5", "click", put(("format",), 0)),
    "format true": ("9.5", "click", put(("format",), True)),
    "a newer format": ("9.5", "click", put(("format",), FORMAT + 1)),
    "a missing key": ("9.8", "click", put(("info",), None)),
    "an unknown key": ("9.8", "click", put(("extra",), 1)),
    "a wrong type": ("9.8", "click", put(("head",), {})),
    "an unknown kind": ("9.8", "click", put(("kind",), "other")),
    "a kind of another task": ("9.8", "click", put(("kind",), "baked")),
    "an array of no part": ("9.8", "click", renamed),
    "too few chunks": ("9.8", "click", put(("chunks",), "")),
    "a field's offset": ("9.9", "click", put(("schema", "fields", 1, "offset"), 1)),
    "a field's size": ("9.9", "click", put(("schema", "fields", 0, "size"), 0)),
    "a field's keys": ("9.9", "click", put(("schema", "fields", 0, "keys"), "sorted")),
    "a field's oov": ("9.9", "click", put(("schema", "fields", 0, "oov"), 1)),
    "two fields of one name": ("9.9", "click", put(("schema", "fields", 1, "name"), "shop")),
    "a field without a name": ("9.9", "click", put(("schema", "fields", 0, "name"), None)),
    "an attempt too many": ("9.9", "click", put(("vocabulary", "attempt"), 64)),
    "keys of too few fields": ("9.9", "click", put(("vocabulary", "keys"), [1])),
    "other numbers of keys": ("9.9", "click", put(("vocabulary", "keys", 0), 1)),
    "more keys than values": ("9.9", "ranking", put(("vocabulary", "keys", 0), 10**6)),
    "a directory that falls": ("9.9", "click", falling),
    "an unknown layout": ("9.10", "click", put((*BLOCK, "layout"), "other")),
    "an unknown storage": ("9.10", "click", put((*BLOCK, "storage"), "bf16")),
    "another storage": ("9.10", "click", put((*BLOCK, "storage"), "fp16")),
    "a stride": ("9.10", "click", put((*BLOCK, "stride"), 63)),
    "a block outside": ("9.10", "click", put((*BLOCK, "right"), 99)),
    "a block without columns": ("9.10", "click", put((*BLOCK, "left"), 8)),
    "an array that is not there": ("9.10", "click", put((*BLOCK, "arrays"), ["values", "scale", "none"])),
    "a block without its arrays": ("9.10", "click", put((*BLOCK, "arrays"), [])),
    "an operation": ("9.10", "product", put((*BLOCK, "settings", "operation"), "max")),
    "a divisor": ("9.10", "product", put((*BLOCK, "settings", "divisor"), 0)),
    "bits": ("9.10", "quantised", put((*BLOCK, "bits"), 9)),
    "other bits": ("9.10", "quantised", put((*BLOCK, "bits"), 7)),
    "no sections": ("9.10", "transform", put((*BLOCK, "arrays"), ["codes"])),
    "a rate of no code": ("9.10", "ranking", put((*BLOCK, "shape", "rates"), [11])),
    "fewer users": ("9.10", "ranking", put((*BLOCK, "shape", "users"), 1)),
    "five atoms": ("9.10", "ranking", put((*BLOCK, "shape", "atoms"), 5)),
    "more rows": ("9.11", "click", put(("table", "rows"), 10**6)),
    "a fill of integers": ("9.11", "click", entry("table.fill", dtype="I32")),
    "an unknown op": ("9.12", "click", put(("head", 0, "kind"), "softmax")),
    "a value of no op": ("9.12", "click", put(("head", 0, "inputs"), ["nothing"])),
    "a tensor that is not there": ("9.12", "click", put(("head", 0, "tensors"), ["none"])),
    "a head that makes a vector": ("9.12", "click", put(("head",), [FLATTEN])),
    "an empty head": ("9.12", "click", put(("head",), [])),
    "a number twice": ("9.12", "numbers", put(("head", 2, "attributes", "bias"), 0.5)),
    "a number with an axis": ("9.12", "numbers", entry("head.2.bias", shape=[1])),
    "a number that is text": ("9.12", "click", put(("head", 2, "attributes", "bias"), "a")),
}  # fmt: skip
"""Section that forbids it, the file, and the change; digests are right in all of them."""


def refused(content: bytes, section: str, folder: Path) -> None:
    """Both readers refuse the file."""
    assert refusal(content).startswith(f"{section}: ")
    (folder / "a").write_bytes(content)

    def use() -> None:
        known = runtime.open(folder / "a")
        known.artifact.verify()
        known.logits(np.full((1, known.schema.width), -1))

    with pytest.raises(PocketRecError):
        use()


def refusal(content: bytes) -> str:
    """Why the reader refuses a file; nothing if it does not."""
    try:
        reader.Reader(content, CONSTANTS).verify()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", CASES)
def test_files_as_they_are_are_not_refused(name, tmp_path):
    for content in (CASES[name], resigned(CASES[name], lambda document, entries: None)):
        assert content == CASES[name]
        reader.Reader(content, CONSTANTS).verify()
        (tmp_path / "a").write_bytes(content)
        runtime.open(tmp_path / "a").artifact.verify()


@pytest.mark.parametrize(("case", "version"), [("click", 2), ("numbers", 1)])
def test_a_number_is_read_from_either_place_whatever_the_version_says(case, version, tmp_path):
    content = resigned(CASES[case], put(("format",), version))
    (tmp_path / "a").write_bytes(content)
    row = [-1, -1, -1]
    wanted, found = (reader.Reader(c, CONSTANTS).logit(row) for c in (CASES[case], content))
    assert wanted == found
    near(runtime.open(tmp_path / "a").logits(np.array([row])), np.array([wanted]))


@pytest.mark.parametrize("blank", [8, 800])
def test_blank_places_mean_nothing(blank, tmp_path):
    zeros = b"0" * 64
    unsigned = CLICK[8:62] + zeros + CLICK[126:142] + zeros + CLICK[206:HEADER]
    content = signed(unsigned + b" " * blank, CLICK[HEADER:])
    assert reader.Reader(content, CONSTANTS).logit([-1] * 3) == reader.Reader(CLICK, CONSTANTS).logit([-1] * 3)
    (tmp_path / "a").write_bytes(content)
    runtime.open(tmp_path / "a").artifact.verify()


@pytest.mark.parametrize("change", CHANGES)
def test_what_must_be_refused(change, tmp_path):
    section, case, function = CHANGES[change]
    refused(resigned(CASES[case], function), section, tmp_path)


CLICK = CASES["click"]
RAW = {
    "nothing": ("9.1", b""),
    "seven bytes": ("9.1", CLICK[:7]),
    "half a header": ("9.1", CLICK[:500]),
    "a huge header": ("9.1", (1 << 40).to_bytes(8, "little") + CLICK[8:]),
    "a header above the limit": ("9.1", (4_194_305).to_bytes(8, "little") + b" " * 4_194_305),
    "no JSON": ("9.2", b"\x08" + bytes(7) + b"{nothing"),
    "no UTF-8": ("9.2", b"\x08" + bytes(7) + b'{"\xff":12}'),
    "a list": ("9.2", b"\x08" + bytes(7) + b"[      ]"),
    "deep JSON": ("9.2", (200_000).to_bytes(8, "little") + b"[" * 200_000),
    "a repeated key": ("9.2", signed(CLICK[8:HEADER].rstrip()[:-1] + b',"table.fill":1}', CLICK[HEADER:])),
    "a number that is none": ("9.2", signed(CLICK[8:HEADER].rstrip()[:-1] + b',"x":NaN}', CLICK[HEADER:])),
    "an infinite number": ("9.2", signed(CLICK[8:HEADER].rstrip()[:-1] + b',"x":1e999}', CLICK[HEADER:])),
    "a byte short": ("9.4", CLICK[:-1]),
    "a byte more": ("9.4", CLICK + b"\0"),
    "the header alone": ("9.4", CLICK[:HEADER]),
    "another digest of the header": ("9.6", CLICK[:142] + bytes([CLICK[142] ^ 1]) + CLICK[143:]),
    "digests elsewhere": ("9.6", CLICK[:8] + b" " + CLICK[8 : HEADER - 1] + CLICK[HEADER:]),
    "another digest of the file": ("1.4", CLICK[:62] + bytes([CLICK[62] ^ 1]) + CLICK[63:]),
    "the first bit of the payload": ("9.7", CLICK[:HEADER] + bytes([CLICK[HEADER] ^ 1]) + CLICK[HEADER + 1 :]),
    "the last bit of the payload": ("9.7", CLICK[:-1] + bytes([CLICK[-1] ^ 128])),
}
"""Files that nobody signed."""


@pytest.mark.parametrize("change", RAW)
def test_what_is_no_file_must_be_refused(change, tmp_path):
    section, content = RAW[change]
    refused(content, section, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_no_flipped_bit_is_believed(name):
    content, rng = CASES[name], np.random.default_rng(5)
    for bit in rng.choice(8 * len(content), 300, replace=False).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        assert refusal(bytes(damaged))


@pytest.mark.parametrize("name", CASES)
def test_no_file_that_was_cut_short_is_believed(name):
    content = CASES[name]
    for length in {*range(0, len(content), 997), len(content) - 1}:
        assert refusal(content[:length])


def test_other_constants_are_not_believed():
    with pytest.raises(ValueError, match=r"^8: not the constants"):
        reader.Reader(CLICK, CONSTANTS[:-1] + b"\1")


def section(number: str) -> str:
    """The text of a section of the page."""
    return re.split(rf"^#+ {re.escape(number)} .*$", PAGE, flags=re.MULTILINE)[1].split("\n#")[0]


def test_the_page_says_where_the_constants_are():
    text = section("8")
    assert f"{len(CONSTANTS):,} bytes" in " ".join(text.split())
    assert constants.DIGEST in text
    rows = re.findall(r"^\| `(\S+)` \| `\(([\d, ]+)\)` \| ([\d,]+) \|", text, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(constants.constants())
    for name, sizes, first in rows:
        shape = tuple(int(n) for n in sizes.split(",") if n.strip())
        start = int(first.replace(",", ""))
        found = np.frombuffer(CONSTANTS, "<f4", int(np.prod(shape)), start).reshape(shape)
        assert_array_equal(found, constants.constants()[name])


def test_the_page_names_every_code_op_and_layout():
    codes = re.findall(r"(?<=\| )(\d+) \| (\d+) \| (\d+) \| (\d+) \|", section("5.9"))
    found = {int(n): (int(bits), int(span), int(memory)) for n, bits, span, memory in codes}
    assert found == {n: (c.bits, c.span, c.memory) for n, c in enumerate(CODES, start=1)}
    assert found == reader_layouts.TRELLIS
    assert set(re.findall(r"^\| `(\w+)` \|", section("6.3"), re.MULTILINE)) == set(program.OPS) == set(reader.OPS)
    titles = re.findall(r"^### 5\.\d (.*)$", PAGE, re.MULTILINE)
    named = {name for title in titles for name in title.split(", ") if " " not in name}
    assert named == set(reader_layouts.LAYOUTS)


def test_the_hash_of_the_page():
    (wanted,) = re.findall(r"`a` has `h = (\d+)`", PAGE)
    assert int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "little") == int(wanted)


def test_the_page_is_of_the_version_that_is_written():
    versions = [int(n) for n in re.findall(r"^\| (\d+) \|", section("10"), re.MULTILINE)]
    assert versions == list(range(1, FORMAT + 1))
    assert PAGE.count(f"above {FORMAT} (a newer version") == 1
    assert reader.NEWEST == FORMAT


def test_an_excluded_item_and_a_tie(tmp_path):
    ranking().contents.write(tmp_path / "a")
    file = reader.Reader((tmp_path / "a").read_bytes(), CONSTANTS)
    known = runtime.open(tmp_path / "a")
    for user in (0, 3, 99):
        assert file.recommend(user, 30, (101, 105)) == known.recommend(user, 30, (101, 105))


def test_the_checksum_of_other_array_files(tmp_path):
    """Section 1.5, with every type."""
    types = {"<f8", "<f4", "<f2", "<i8", "<i4", "<i2", "|i1", "<u8", "<u4", "<u2", "|u1", "|b1"}
    assert types == set(re.findall(r"`([<|]\w\d)`", section("1.5")))
    arrays = {f"a{i}": np.arange(6).reshape(2, 3).astype(dtype) for i, dtype in enumerate(sorted(types))}
    save_arrays(tmp_path / "a", arrays, {"step": 7, "b": [1.5, "ä"]})
    content = (tmp_path / "a").read_bytes()
    document, places, payload = reader.container(content)
    order = sorted(places, key=lambda name: places[name][2:])
    assert order == sorted(places, key=lambda name: (-places[name][0].itemsize, name))
    order.remove("crc32")
    told = spelled([document, [(name, places[name][0].str, places[name][1]) for name in order]])
    checksum = zlib.crc32(told.encode())
    for name in order:
        _, _, start, stop = places[name]
        checksum = zlib.crc32(content[payload + start : payload + stop], checksum)
    start = payload + places["crc32"][2]
    assert int.from_bytes(content[start : start + 4], "little") == checksum
