"""Who shares a number: one vocabulary for masks, compositions, lengths, thresholds and scales.

A setting takes those of the words that make sense for it:

================  =====================================================
``joint``         all counted blocks together
``block``         each block for itself
``field``         the rows of a field
``row``           a row
``column``        a column
``field_column``  a column, within the rows of a field
``cell``          nobody: every entry has its own
================  =====================================================
"""

from __future__ import annotations

from typing import Literal

Sharing = Literal["joint", "block", "field", "row", "column", "field_column", "cell"]
"""Every word."""

BlockSharing = Literal["joint", "block"]
"""Of a ranking of entries, or of a composition: over all counted blocks, or within each."""

RowSharing = Literal["field", "row"]
"""Of a length, or of a threshold on the norm of rows."""

ThresholdSharing = Literal["joint", "column", "row", "field", "cell", "field_column"]
"""Of a soft threshold on entries."""

ScaleSharing = Literal["column", "block"]
"""Of the range of a quantiser, within each field."""
