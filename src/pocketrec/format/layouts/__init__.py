"""Layouts of tables whose vectors are computed when they are looked up, one module each. Torch-free.

This folder is the closed list of them: a file names a layout by its module, and layout ``hash_mlp`` is read by
``HashMlpBlock``. No other name is ever imported.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from pocketrec.format.block import FileBlock

NAMES = tuple(sorted(module.name for module in iter_modules(__path__)))


def block_class(name: str) -> type[FileBlock]:
    """The class that reads a layout of :data:`NAMES`, loaded when a file has it.

    Example:
        >>> block_class("hash_mlp").__name__
        'HashMlpBlock'
    """
    return getattr(import_module(f"{__name__}.{name}"), f"{name.title().replace('_', '')}Block")
