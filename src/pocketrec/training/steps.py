"""What a long step talks to: signals, checkpoints, progress, and the parts it can be cut into."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from pocketrec.files import remove
from pocketrec.format.arrays import open_arrays, save_arrays

if TYPE_CHECKING:
    pass


Arrays = dict[str, NDArray[Any]]


class Progress(Protocol):
    """Told how far a long step is: ``done`` of ``total`` units, and the figures of the moment."""

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Called at every step of the work."""


class Watch(Protocol):
    """Told how each epoch of a training came out; may raise :class:`Abandoned`."""

    def __call__(self, stage: str, epoch: int, metric: float | None) -> None:
        """Called after every epoch with its figure on validation."""


class StepPart(Protocol):
    """Computes one part of a step; a pure function of the key and the seed that can be sent to another process."""

    def __call__(self, key: Any, checkpoint: Checkpoint) -> Mapping[str, NDArray[Any]]:
        """The arrays of the part ``key``."""
        ...


WORTH = 200
"""How many times as long as a save the work between two of them is, where none is due otherwise."""


class Abandoned(Exception):
    """Whoever watches a step has seen enough: it ends unfinished, and leaves no checkpoint."""


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop; everything is saved, and the same command goes on from there."""


class Signals:
    """SIGINT and SIGTERM as a request that is met at the next checkpoint; a second one is met at once."""

    def __init__(self) -> None:
        self.pending: int | None = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal that comes inside the block reaches its handler when the block is left.

        Outside the main thread nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self.pending is not None:
                signal.raise_signal(self.pending)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            raise Stopped
        self.pending = number


class Checkpoint:
    """Where a long step leaves what it needs to go on. A step asks ``due()`` at its boundaries and then ``save``s.

    Args:
        path: the file, or ``None`` to keep nothing.
        identity: digest of the step; a file of another step is not loaded.
        every_seconds: least time between two saves.
        every_calls: also due at every so many calls of ``due``; 0 for never.
        signals: a pending one makes ``due`` true and ``save`` stop the process once the state is safe.
    """

    def __init__(
        self, path: Path | None, identity: str, every_seconds: float, every_calls: int, signals: Signals
    ) -> None:
        self.path, self.identity, self._every_seconds = path, identity, every_seconds
        self._every_calls, self._signals = every_calls, signals
        self._saved_at = self._started = time.monotonic()
        self._before = 0.0
        self._calls = 0
        self._cost = 0.0

    @property
    def seconds(self) -> float:
        """What the step has taken, earlier starts included; what a kill undid does not count."""
        return self._before + time.monotonic() - self._started

    def load(self) -> Arrays | None:
        """What was saved last, or ``None`` at a first start."""
        if self.path is None or not self.path.exists():
            return None
        arrays, meta = open_arrays(self.path)
        if meta["identity"] != self.identity:
            return None
        self._before, self._started = meta.get("seconds", 0.0), time.monotonic()
        return arrays

    def due(self) -> bool:
        """Whether it is time to save."""
        if self._signals.pending is not None:
            return True
        if self.path is None:
            return False
        self._calls += 1
        by_calls = self._every_calls > 0 and self._calls % self._every_calls == 0
        return by_calls or time.monotonic() - self._saved_at >= self._every_seconds

    def worth(self) -> bool:
        """Whether the work since the last save is long against a save: at least as long as ``WORTH`` of them.

        For boundaries that are good to go on from, such as the end of an epoch; the first one is always worth it.
        """
        return self.due() or (self.path is not None and time.monotonic() - self._saved_at >= WORTH * self._cost)

    def save(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace what ``load`` returns; then stop, if a signal has asked for it.

        Raises:
            Stopped: a signal came; the state is saved.
        """
        started = time.monotonic()
        if self.path is not None:
            save_arrays(self.path, arrays, {"identity": self.identity, "seconds": self.seconds})
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started
        if self._signals.pending is not None:
            raise Stopped

    def clear(self) -> None:
        """Remove the file; the step is finished."""
        if self.path is not None:
            remove(self.path)
