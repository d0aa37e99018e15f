"""Progress on a terminal: one line per stage on stderr, nothing where stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Watcher:
    """Told how far long steps are; draws a bar per stage while it is entered."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """``done`` of ``total`` units of ``stage``, and the figures of the moment."""
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._bars.update(self._task(stage), completed=done, total=total, figures=shown)

    def rows(self, stage: str, done: int) -> None:
        """``done`` rows of ``stage``, out of nobody knows how many."""
        self._bars.update(self._task(stage), completed=done)

    def _task(self, stage: str) -> TaskID:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=None, figures="")
        return self._tasks[stage]
