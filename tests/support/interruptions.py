"""What a test raises in the middle of a run."""

from __future__ import annotations


class Cut(Exception):
    """Where a process would be killed."""
