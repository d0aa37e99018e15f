"""One root error, few leaves: what was expected, what came, and the way out.

The command line prints the message on one line and exits with the leaf's ``exit_code``.
"""

from __future__ import annotations

from typing import ClassVar


class PocketRecError(Exception):
    """Root of every error that PocketRec raises on purpose."""

    exit_code: ClassVar[int] = 2


class ConfigError(PocketRecError):
    """A setting is out of range, of the wrong type, or contradicts another."""


class BudgetError(PocketRecError):
    """A budget cannot be reached; ``least_bytes`` or ``least_values`` says what can."""

    def __init__(self, message: str, *, least_bytes: int | None = None, least_values: int | None = None) -> None:
        super().__init__(message)
        self.least_bytes, self.least_values = least_bytes, least_values


class UnsupportedOp(PocketRecError):
    """The object cannot do what was asked of it (for instance ``recommend`` on a click model)."""


class DataError(PocketRecError):
    """Input rows, labels or ids are not what the format promises."""

    exit_code: ClassVar[int] = 3


class ArtifactError(PocketRecError):
    """A file is not a PocketRec file, or its bytes are damaged."""

    exit_code: ClassVar[int] = 3


class DivergedError(PocketRecError):
    """A loss, gradient or score stopped being finite."""

    exit_code: ClassVar[int] = 4


class StorageError(PocketRecError):
    """The file system refused: disk full, no permission, no such folder."""

    exit_code: ClassVar[int] = 4


class RunLocked(PocketRecError):
    """Another living process works in the same folder."""

    exit_code: ClassVar[int] = 4
