"""Plug-ins by name: every module in ``pocketrec.<axis>`` and every entry point of the group ``pocketrec.<axis>``.

Adding a plug-in is adding a file; removing one removes its name and nothing else. Torch-free until a plug-in is loaded.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal

from pocketrec.errors import ConfigError

Axis = Literal["sources", "backbones", "methods"]


def modules(axis: Axis) -> dict[str, str]:
    """Plug-in name -> where it is loaded from; nothing is imported yet but the axis package."""
    package = importlib.import_module(f"pocketrec.{axis}")
    found = {m.name: f"pocketrec.{axis}.{m.name}" for m in pkgutil.iter_modules(package.__path__)}
    return dict(sorted({**found, **_installed(axis)}.items()))


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


def public(axis: Axis, attribute: str) -> type[Any]:
    """The plug-in class by its class name, for ``pocketrec.<axis>.<ClassName>``."""
    wanted = attribute.lower()
    for name in modules(axis):
        if name.replace("_", "") == wanted and (cls := load(axis, name)).__name__ == attribute:
            return cls
    raise AttributeError(f"module 'pocketrec.{axis}' has no attribute {attribute!r}")
