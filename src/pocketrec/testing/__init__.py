"""Exams: what every source, backbone and method must do, shipped so that third parties can run them on their own.

In the test file of a package with a method ``MyMethod``::

    import pytest
    from pocketrec import testing


    @pytest.fixture(scope="session")
    def lab(tmp_path_factory):
        return testing.Lab(tmp_path_factory.mktemp("lab"))


    @pytest.mark.parametrize("check", testing.checks("methods"), ids=lambda check: check.__name__)
    def test_my_method(check, lab):
        check(MyMethod(), lab)

A check returns when the plug-in passes and raises :class:`ExamFailed` with what was expected and what came. A source's
exam also needs a small raw file: ``Lab(folder, raw=path)``.
"""

from __future__ import annotations

import inspect
from types import ModuleType

from pocketrec.registry import Axis
from pocketrec.testing import backbone, method, plugin, source
from pocketrec.testing.lab import Check, ExamFailed, Lab

__all__ = ["Check", "ExamFailed", "Lab", "checks"]

_MODULES: dict[Axis, ModuleType] = {"sources": source, "backbones": backbone, "methods": method}


def checks(axis: Axis) -> tuple[Check, ...]:
    """The exam of one axis: the checks of every plug-in, then those of the axis, in the order they are written.

    Example:
        >>> min(len(checks("sources")), len(checks("backbones")), len(checks("methods"))) >= 20
        True
    """
    return (*_written(plugin), *_written(_MODULES[axis]))


def _written(module: ModuleType) -> tuple[Check, ...]:
    named = inspect.getmembers(module, inspect.isfunction)
    return tuple(sorted((f for name, f in named if name.startswith("check_")), key=lambda f: f.__code__.co_firstlineno))
