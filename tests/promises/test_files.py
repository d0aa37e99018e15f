"""Files are old or new, locks die with their process, journals heal, array files are strict and deterministic."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from pocketrec import files
from pocketrec.errors import ArtifactError, ConfigError, RunLocked, StorageError
from pocketrec.files import Journal, Lock, atomic_write, canonical_json, digest
from pocketrec.format import arrays
from pocketrec.format.arrays import open_arrays, save_arrays

OLD, NEW = b"old contents", b"new contents, which are longer"


class ShortWrites(io.FileIO):
    """A file that takes at most three bytes a write."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data)[:3])


class Faults:
    """Lets the ``nth`` system call of a write fail with ``code``; counts the calls."""

    def __init__(self, nth: int, code: int) -> None:
        self.nth, self.code, self.calls = nth, code, 0

    def step(self) -> None:
        self.calls += 1
        if self.calls == self.nth:
            raise OSError(self.code, os.strerror(self.code))

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.step()
            return call(*args, **kwargs)

        return wrapped

    def fdopen(self, fd: int, mode: str) -> BinaryIO:
        faults = self

        class Faulty(ShortWrites):
            def write(self, data: Any) -> int:
                faults.step()
                return super().write(data)

        return io.BufferedWriter(Faulty(fd, mode))


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, nth: int, code: int) -> Iterator[Faults]:
    faults = Faults(nth, code)
    with monkeypatch.context() as patch:
        for owner, name in [
            (files.os, "open"), (files.os, "fsync"), (files.os, "pwrite"), (fcntl, "flock"), (Path, "replace"),
        ]:  # fmt: skip
            patch.setattr(owner, name, faults.wrap(getattr(owner, name)))
        patch.setattr(files.os, "fdopen", faults.fdopen)
        yield faults


def outcome(write: Callable[[], None]) -> str:
    """The message of the storage error, if there is one."""
    try:
        write()
    except StorageError as error:
        return str(error)
    return ""


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def run_python(code: str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env=os.environ | environment, check=False
    )


# ---- atomic writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("kind", ["bytes", "writer", "arrays"])
def test_a_failed_system_call_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: str
) -> None:
    target = tmp_path / "file"
    writes: dict[str, Callable[[], None]] = {
        "bytes": lambda: atomic_write(target, NEW),
        "writer": lambda: atomic_write(target, lambda file: file.writelines([NEW[:5], NEW[5:]])),
        "arrays": lambda: save_arrays(target, {"x": np.arange(9)}, {"a": 1}),
    }
    writes[kind]()
    new = target.read_bytes()
    for nth in range(1, 2000):
        target.write_bytes(OLD)
        with failing(monkeypatch, nth, code) as faults:
            message = outcome(writes[kind])
        if faults.calls >= nth:
            assert str(target) in message
            assert os.strerror(code) in message
        assert target.read_bytes() in (OLD, new)
        assert names_in(tmp_path) == ["file"]
        if faults.calls < nth:
            assert target.read_bytes() == new
            assert nth > 6
            return
    pytest.fail("the write never succeeded")


def test_a_writer_that_raises_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(OLD)

    def writer(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyError("stop")

    with pytest.raises(KeyError):
        atomic_write(target, writer)
    assert target.read_bytes() == OLD
    assert names_in(tmp_path) == ["file"]


def test_a_file_size_limit_is_a_storage_error(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(OLD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            atomic_write(target, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == OLD
    assert names_in(tmp_path) == ["file"]


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        atomic_write(tmp_path / "nowhere" / "file", NEW)


WRITE = "import sys; from pocketrec.files import atomic_write; atomic_write(sys.argv[1], sys.argv[2].encode())"


def test_a_kill_at_every_boundary_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    count, folder = tmp_path / "count", tmp_path / "folder"
    folder.mkdir()
    target = folder / "file"
    assert run_python(WRITE, str(target), "new", POCKETREC_CRASH_COUNT=str(count)).returncode == 0
    names = count.read_text().split("\n")[:-1]
    assert names == ["write", "rename", "renamed"]
    for number in range(1, len(names) + 1):
        target.write_bytes(OLD)
        assert run_python(WRITE, str(target), "new", POCKETREC_CRASH_AT=str(number)).returncode == -signal.SIGKILL
        assert target.read_bytes() in (OLD, b"new")
        atomic_write(target, b"again")
        assert target.read_bytes() == b"again"
        assert names_in(folder) == ["file"]


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    target = tmp_path / "file"
    contents = [bytes([65 + i]) * 300_000 for i in range(4)]
    atomic_write(target, contents[0])
    seen: list[bytes] = []
    threads = [threading.Thread(target=lambda c=c: [atomic_write(target, c) for _ in range(15)]) for c in contents]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        seen.append(target.read_bytes())
    assert seen
    assert set(seen) <= set(contents)
    assert names_in(tmp_path) == ["file"]


# ---- locks -------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pocketrec.files import Lock
with Lock(sys.argv[1]):
    print('held', flush=True)
    sys.stdin.read()
"""
APPEND = """
import sys
from pocketrec.files import Journal
journal = Journal(sys.argv[1])
for n in range(100):
    journal.append({'who': sys.argv[2], 'n': n})
"""
SAVE = """
import sys, numpy as np
from pocketrec.format.arrays import save_arrays
names = {'b', 'a', 'c', 'long name'}
save_arrays(sys.argv[1], {n: np.full(3, float(len(n))) for n in names}, {n: 1 for n in names})
"""


def test_a_living_process_keeps_its_lock_and_a_dead_one_loses_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunLocked, match=f"pid {holder.pid}"), Lock(path):
            pass
        assert holder.poll() is None
    finally:
        holder.kill()
        holder.communicate()
    with Lock(path):
        pass
    assert names_in(tmp_path) == []


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    inside, most, wins = 0, 0, 0
    guard = threading.Lock()

    def contend() -> None:
        nonlocal inside, most, wins
        for _ in range(50):
            try:
                with Lock(path):
                    with guard:
                        inside, wins = inside + 1, wins + 1
                        most = max(most, inside)
                    time.sleep(0)
                    with guard:
                        inside -= 1
            except RunLocked:
                pass

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert wins >= 1


# ---- journal -----------------------------------------------------------------------------------------------------


def test_a_tear_at_every_byte_costs_the_last_record_only(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    records = [{"n": i, "text": "ä\r\n" * i} for i in range(4)]
    for record in records:
        journal.append(record)
    content = path.read_bytes()
    last = content[:-1].rindex(b"\n") + 1
    for length in range(last, len(content)):
        path.write_bytes(content[:length])
        healed = Journal(path)
        assert path.read_bytes() == content[:last]
        assert healed.read() == records[:-1]
        healed.append(records[-1])
        assert path.read_bytes() == content


def test_a_tear_of_an_open_journal_heals_at_the_next_append(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append({"n": 0})
    with path.open("ab") as file:
        file.write(b'00000000 {"n"')
    journal.append({"n": 1})
    assert journal.read() == [{"n": 0}, {"n": 1}]


def test_damage_before_the_last_record_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for i in range(3):
        Journal(path).append({"n": i})
    content = path.read_bytes()
    for position in range(content.index(b"\n")):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError, match="record 1 is damaged"):
                Journal(path)
            assert path.read_bytes() == damaged


def test_a_failed_append_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append({"n": 0})
    before = path.read_bytes()
    for nth in range(1, 10):
        with failing(monkeypatch, nth, errno.ENOSPC) as faults:
            if nth <= 4:
                with pytest.raises(StorageError, match="No space left"):
                    journal.append({"n": 1})
                assert path.read_bytes() == before
            else:
                journal.append({"n": 1})
                assert faults.calls == 4
                break
    assert journal.read() == [{"n": 0}, {"n": 1}]


def test_concurrent_appends_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    workers = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), str(w)]) for w in range(4)]
    assert [w.wait() for w in workers] == [0] * 4
    found = [(r["who"], r["n"]) for r in Journal(path).read()]
    assert len(found) == 400
    for worker in "0123":
        assert [n for who, n in found if who == worker] == list(range(100))


# ---- canonical JSON ----------------------------------------------------------------------------------------------

documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(documents)
def test_canonical_json_round_trips_and_ignores_the_order_of_keys(document: Any) -> None:
    try:
        text = canonical_json(document)
    except ConfigError:
        assert any(0xD800 <= ord(c) < 0xE000 for c in json.dumps(document, ensure_ascii=False))
        return
    assert json.loads(text) == document
    assert files.parse_json(text) == document
    if isinstance(document, dict):
        assert canonical_json(dict(reversed(document.items()))) == text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1j}, b"bytes", {"a": object()}])
def test_what_json_cannot_express_is_a_config_error(bad: Any) -> None:
    with pytest.raises(ConfigError, match="JSON"):
        canonical_json(bad)


def test_digest_is_sha256() -> None:
    assert digest(b"abc") == hashlib.sha256(b"abc").hexdigest()
    assert digest({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()


# ---- array files -------------------------------------------------------------------------------------------------

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
