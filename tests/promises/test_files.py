"""Files are old or new, locks die with their process, journals heal, and JSON has one spelling."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from file_cases import documents, names_in, run_python
from hypothesis import given

from pocketrec import files
from pocketrec.errors import ArtifactError, ConfigError, RunLocked, StorageError
from pocketrec.files import Journal, Lock, atomic_write, canonical_json, digest
from pocketrec.format.arrays import save_arrays

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


# ---- canonical JSON --------------------------------------------------------------------------------------------------


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
