"""A file fits in a head: bounds on the length of files, functions and plug-ins, counted from the syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import pocketrec

PACKAGE = Path(pocketrec.__file__).parent
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))
FILE, FUNCTION, METHOD = 500, 50, 250
EXCEPTIONS: dict[str, str] = {
    "data/encode.py:encode": "its 15 arguments are documented one by one; the code is half of the lines",
    "study/profiling/profile.py:profile": "its 12 arguments and its records are documented; 23 lines are code",
}
"""A file, or ``file:function``, that is longer, and why: at most five."""


def longer(name: str) -> list[str]:
    """What of a file is longer than it may be."""
    text = (PACKAGE / name).read_text(encoding="utf-8")
    most = METHOD if name.startswith("methods/") else FILE
    over = [name] if len(text.splitlines()) > most else []
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return over + [f"{name}:{n.name}" for n in functions if (n.end_lineno or 0) - n.lineno + 1 > FUNCTION]


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    assert [place for place in longer(name) if place not in EXCEPTIONS] == []


def test_exceptions_are_few_and_needed():
    assert len(EXCEPTIONS) <= 5
    assert all(place in longer(place.partition(":")[0]) and reason for place, reason in EXCEPTIONS.items())
