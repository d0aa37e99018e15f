"""Plug-ins by name: every module in ``pocketrec.<axis>`` and every entry point of the group ``pocketrec.<axis>``.

Adding a plug-in is adding a file; removing one removes its name and nothing else. Torch-free until a plug-in is loaded.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal, get_args

from pocketrec.errors import ConfigError

Axis = Literal["sources", "backbones", "methods"]

AXES: tuple[Axis, ...] = get_args(Axis)


def modules(axis: Axis, *, installed: bool = True) -> dict[str, str]:
    """Plug-in name -> where it is loaded from; nothing is imported yet but the axis package.

    Args:
        axis: which plug-ins.
        installed: those of other distributions, too.
    """
    package = importlib.import_module(f"pocketrec.{axis}")
    own = {m.name: f"pocketrec.{axis}.{m.name}" for m in pkgutil.iter_modules(package.__path__)}
    return dict(sorted({**own, **(_installed(axis) if installed else {})}.items()))


@cache
def _installed(axis: Axis) -> dict[str, str]:
    """Plug-ins of other distributions; reading the metadata of all that is installed takes milliseconds."""
    return {e.name: e.value for e in entry_points(group=f"pocketrec.{axis}")}


def load(axis: Axis, name: str) -> type[Any]:
    """The plug-in class called ``name``; an unknown name raises :class:`ConfigError` with the nearest one."""
    known = modules(axis)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"`{axis}` must be one of {', '.join(known)}, but got {name!r}{hint}")
    target, _, attribute = known[name].partition(":")
    module = importlib.import_module(target)
    if attribute:
        return getattr(module, attribute)
    classes = [
        c for _, c in inspect.getmembers(module, inspect.isclass)
        if c.__module__ == module.__name__ and c.__dict__.get("name") == name
    ]  # fmt: skip
    if len(classes) != 1:
        raise ConfigError(f"{target} must define exactly one class with name = {name!r}, but defines {len(classes)}.")
    return classes[0]


def attributes(axis: Axis) -> tuple[Callable[[str], type[Any]], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of an axis's package: its classes by name, loaded on first use."""

    def find(attribute: str) -> type[Any]:
        wanted = attribute.lower()
        for name in modules(axis):
            if name.replace("_", "") == wanted and (cls := load(axis, name)).__name__ == attribute:
                return cls
        raise AttributeError(f"module 'pocketrec.{axis}' has no attribute {attribute!r}")

    return find, lambda: sorted(load(axis, name).__name__ for name in modules(axis))
