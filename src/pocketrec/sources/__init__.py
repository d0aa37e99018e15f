"""Plug-in axis: one file each; ``pocketrec.sources.ClassName`` loads on first use."""

from __future__ import annotations

from typing import Any

from pocketrec import registry


def __getattr__(name: str) -> type[Any]:
    if name.startswith("_"):
        raise AttributeError(name)
    return registry.public("sources", name)
