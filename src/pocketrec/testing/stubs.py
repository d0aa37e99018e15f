"""What an editor knows of the axes: a stub beside each ``__init__``, written from the plug-ins that lie there.

``python -m pocketrec.testing.stubs`` writes them anew after a plug-in has come or gone. Nothing reads them at run time.
"""

from __future__ import annotations

from pathlib import Path

import pocketrec
from pocketrec import registry
from pocketrec.files import atomic_write

_HEAD = "# Written by `python -m pocketrec.testing.stubs`: the plug-ins of this folder, for editors and type checkers."


def stub(axis: registry.Axis) -> str:
    """The text of an axis's stub: one line for each plug-in of the package itself.

    Example:
        >>> "from pocketrec.methods.qr import QR as QR" in stub("methods")
        True
    """
    classes = (registry.load(axis, name) for name in registry.modules(axis, installed=False))
    lines = sorted(f"from {cls.__module__} import {cls.__name__} as {cls.__name__}" for cls in classes)
    return "\n".join([_HEAD, "", *lines]) + "\n"


def place(axis: registry.Axis) -> Path:
    """Where the stub of an axis lies."""
    return Path(pocketrec.__file__).parent / axis / "__init__.pyi"


if __name__ == "__main__":
    for name in registry.AXES:
        atomic_write(place(name), stub(name).encode())
