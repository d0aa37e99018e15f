"""Every registered plug-in sits the exam of its axis; and the exam catches plug-ins that break a law."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

from pocketrec import registry, testing
from pocketrec.testing import ExamFailed, Lab

RAW = {
    "table": ("rows.csv", "".join(f"{i % 2},{i % 5},{i % 3 / 7:.3f},c{i % 4}\n" for i in range(60)), "label,a,b,c\n"),
}


def examined(axis):
    return [
        pytest.param(name, check, id=f"{name}-{check.__name__.removeprefix('check_')}")
        for name in registry.modules(axis)
        for check in testing.checks(axis)
    ]


@pytest.mark.parametrize(("name", "check"), examined("backbones"))
def test_backbone(name, check, lab):
    check(registry.load("backbones", name)(), lab)


@pytest.mark.parametrize(("name", "check"), examined("methods"))
def test_method(name, check, lab):
    check(registry.load("methods", name)(), lab)
