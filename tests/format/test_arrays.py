"""Array files are strict and deterministic, and other readers agree with ours."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from file_cases import documents, names_in, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from pocketrec.errors import ArtifactError, ConfigError, StorageError
from pocketrec.files import canonical_json
from pocketrec.format import arrays
from pocketrec.format.arrays import open_arrays, save_arrays

SAVE = """
import sys, numpy as np
from pocketrec.format.arrays import save_arrays
names = {'b', 'a', 'c', 'long name'}
save_arrays(sys.argv[1], {n: np.full(3, float(len(n))) for n in names}, {n: 1 for n in names})
"""
DTYPES = ["?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"]
any_arrays = hnp.arrays(
    st.sampled_from(DTYPES).map(np.dtype), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
)


@settings(max_examples=60)
@given(st.dictionaries(st.text("abc.é", min_size=1, max_size=4), any_arrays, max_size=4), documents)
def test_arrays_round_trip_and_other_readers_agree(
    tmp_path_factory: pytest.TempPathFactory, given_arrays: Any, meta: Any
) -> None:
    path = tmp_path_factory.mktemp("arrays") / "a.safetensors"
    try:
        canonical_json(meta)
    except ConfigError:
        meta = None
    save_arrays(path, given_arrays, meta)
    found, found_meta = open_arrays(path)
    assert found_meta == meta
    assert set(found) == set(given_arrays)
    peer = load_file(path)
    for name, array in given_arrays.items():
        for other in (found[name], peer[name]):
            assert other.dtype == array.dtype
            assert other.shape == array.shape
            assert other.tobytes() == array.tobytes()
        assert found[name].flags.aligned
        assert not found[name].flags.writeable


def test_the_same_arrays_are_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    found = set()
    for seed in range(4):
        path = tmp_path / str(seed)
        assert run_python(SAVE, str(path), PYTHONHASHSEED=str(seed)).returncode == 0
        found.add(path.read_bytes())
    assert len(found) == 1


def test_strided_arrays_are_written_in_c_order(tmp_path: Path) -> None:
    array = np.arange(24).reshape(2, 3, 4)
    save_arrays(tmp_path / "a", {"t": array.T, "s": array[:, ::2]})
    found, meta = open_arrays(tmp_path / "a")
    assert meta is None
    np.testing.assert_array_equal(found["t"], array.T)
    np.testing.assert_array_equal(found["s"], array[:, ::2])


def test_a_large_table_is_streamed(tmp_path: Path) -> None:
    table = np.ones((1_000_000, 16), np.float32)
    tracemalloc.start()
    save_arrays(tmp_path / "a", {"table": table})
    found, _ = open_arrays(tmp_path / "a")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert found["table"][-1, -1] == 1


def test_arrays_that_cannot_be_stored_are_config_errors(tmp_path: Path) -> None:
    for bad in ({"x": np.array(["a"])}, {"x": np.zeros(2, complex)}, {"__metadata__": np.zeros(2)}):
        with pytest.raises(ConfigError, match="must have a dtype"):
            save_arrays(tmp_path / "a", bad)
    with pytest.raises(ConfigError, match="header may take"):
        save_arrays(tmp_path / "a", {}, "x" * arrays.HEADER_LIMIT)
    assert names_in(tmp_path) == []


def with_header(header: bytes, payload: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + payload


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def document(meta: Any = "null", **entries: Any) -> bytes:
    return json.dumps({"__metadata__": {"pocketrec": meta}, **entries}).encode()


FOUR = b"\0" * 4
LIARS = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "no header": with_header(b""),
    "length 2^63": with_header(document(), length=2**63),
    "length 1 GiB": with_header(document(), length=1 << 30),
    "length one too many": with_header(document(), length=len(document()) + 1),
    "not UTF-8": with_header(b"\xff\xfe{}"),
    "not JSON": with_header(b"hello world"),
    "a list": with_header(b"[]"),
    "a number": with_header(b"7"),
    "deep lists": with_header(b"[" * 100_000),
    "deep objects": with_header(b'{"a":' * 100_000),
    "deep metadata": with_header(document("[" * 100_000)),
    "no metadata": with_header(b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', FOUR),
    "metadata is text": with_header(b'{"__metadata__":"pocketrec"}'),
    "metadata with two keys": with_header(b'{"__metadata__":{"pocketrec":"null","format":"pt"}}'),
    "metadata is a number": with_header(b'{"__metadata__":{"pocketrec":7}}'),
    "metadata is not JSON": with_header(document("{")),
    "metadata with NaN": with_header(document("NaN")),
    "metadata with infinity": with_header(document("-Infinity")),
    "metadata with 1e999": with_header(document("1e999")),
    "metadata with a repeated key": with_header(document('{"a":1,"a":2}')),
    "integer of 10^5 digits": with_header(document("9" * 100_000)),
    "repeated array": with_header(
        b'{"__metadata__":{"pocketrec":"null"},"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
        b'"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        FOUR,
    ),
    "unknown dtype": with_header(document(x=entry(dtype="BF16")), FOUR),
    "dtype is a list": with_header(document(x=entry(dtype=["U8"])), FOUR),
    "shape is a number": with_header(document(x=entry(shape=4)), FOUR),
    "shape of bools": with_header(document(x=entry(shape=[True], offsets=[0, 1])), b"\0"),
    "shape of floats": with_header(document(x=entry(shape=[4.0])), FOUR),
    "negative shape": with_header(document(x=entry(shape=[-2, -2])), FOUR),
    "shape 2^63": with_header(document(x=entry(shape=[2**63])), FOUR),
    "shape 2^63 with offsets": with_header(document(x=entry(shape=[2**63], offsets=[0, 2**63])), FOUR),
    "shape 0 x 2^63": with_header(document(x=entry(shape=[0, 2**63], offsets=[0, 0]))),
    "100 dimensions": with_header(document(x=entry(shape=[1] * 100, offsets=[0, 1])), b"\0"),
    "three offsets": with_header(document(x=entry(offsets=[0, 2, 4])), FOUR),
    "negative offset": with_header(document(x=entry(offsets=[-4, 0])), FOUR),
    "falling offsets": with_header(document(x=entry(offsets=[4, 0])), FOUR),
    "offsets too wide": with_header(document(x=entry(offsets=[0, 5])), b"\0" * 5),
    "overlap": with_header(document(x=entry(), y=entry(offsets=[2, 6])), b"\0" * 6),
    "shared bytes": with_header(document(x=entry(), y=entry()), FOUR),
    "hole": with_header(document(x=entry(), y=entry(offsets=[6, 10])), b"\0" * 10),
    "hole at the start": with_header(document(x=entry(offsets=[2, 6])), b"\0" * 6),
    "trailing bytes": with_header(document(x=entry()), FOUR + b"\0"),
    "cut payload": with_header(document(x=entry()), FOUR[:3]),
    "extra key": with_header(document(x=entry() | {"strides": [1]}), FOUR),
    "missing key": with_header(document(x={"dtype": "U8", "shape": [4]}), FOUR),
    "array is text": with_header(document(x="U8"), FOUR),
    "array is null": with_header(document(x=None), FOUR),
    "pickle": b"\x80\x04\x95" + b"K" * 100,
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "npy": b"\x93NUMPY\x01\x00" + b" " * 100,
    "text": b"label\tuser\titem\n" * 10,
}


@pytest.mark.parametrize("name", LIARS)
def test_liars_are_refused_before_anything_is_allocated(tmp_path: Path, name: str) -> None:
    path = tmp_path / "liar"
    path.write_bytes(LIARS[name])
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="liar"):
        open_arrays(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


def test_foreign_files_are_named(tmp_path: Path) -> None:
    for name, text in {"pickle": "pickle", "zip": "zip archive"}.items():
        (tmp_path / name).write_bytes(LIARS[name])
        with pytest.raises(ArtifactError, match=text):
            open_arrays(tmp_path / name)


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        open_arrays(tmp_path / "nothing")
    with pytest.raises(StorageError, match="directory"):
        open_arrays(tmp_path)


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    path = tmp_path / "noise"
    for _ in range(100):
        path.write_bytes(generator.bytes(int(generator.integers(0, 200))))
        with pytest.raises(ArtifactError):
            open_arrays(path)
