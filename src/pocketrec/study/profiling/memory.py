"""Resident memory of this process, as Linux counts it: private pages, and touched pages of mapped files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

STATUS = Path("/proc/self/status")
PEAK_RESET = "5"


def resident(entry: Literal["VmRSS", "VmHWM"]) -> float:
    """MiB that are resident now, or were at most since the mark was last reset."""
    return int(STATUS.read_text().split(f"{entry}:")[1].split()[0]) / 1024


def reset() -> bool:
    """Have the high-water mark start anew from what is resident now; whether the system lets us."""
    try:
        STATUS.with_name("clear_refs").write_text(PEAK_RESET)
    except OSError:
        return False
    return True


class Peak:
    """The most that was resident since this object was made, in MiB; ``None`` where the system does not tell.

    What the process held before (libraries, opened data sets) is part of it; the memory of a GPU is not. Of several
    only the last one made is right.

    Example:
        >>> peak = Peak()()
        >>> peak is None or peak > 1
        True
    """

    def __init__(self) -> None:
        self._known = reset()

    def __call__(self) -> float | None:
        """The peak so far."""
        return resident("VmHWM") if self._known else None
