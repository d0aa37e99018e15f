"""The suite mirrors the house: folders are rooms, what tests share stands once, and documents name tests that exist."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
ROOMS = {p.name for p in (ROOT / "src" / "pocketrec").iterdir() if (p / "__init__.py").is_file()}
FILES = sorted(p.relative_to(TESTS) for p in TESTS.rglob("*.py"))
PAGES = [p for pattern in ("*.md", "docs/**/*.md", "src/**/*.py", "bench/*.py") for p in ROOT.glob(pattern)]
DOCUMENTS = sorted(p for p in PAGES if p.name != "CHANGELOG.md")


def test_every_folder_is_a_room_or_holds_promises_or_support():
    folders = {file.parts[0] for file in FILES if len(file.parts) > 1}
    assert {"promises", "support"} <= folders
    assert folders - {"promises", "support"} <= ROOMS
    assert {file.name for file in FILES if len(file.parts) == 1} == {"conftest.py"}
    assert not [file for file in FILES if file.parts[0] == "support" and file.name.startswith("test_")]


def test_no_file_has_over_500_lines():
    assert not [str(file) for file in FILES if len((TESTS / file).read_text(encoding="utf-8").splitlines()) > 500]


def fixtures() -> Iterator[tuple[Path, str, str]]:
    """File, name and body, docstring left out, of every fixture."""
    for file in FILES:
        for node in ast.walk(ast.parse((TESTS / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("fixture" in ast.unparse(d) for d in node.decorator_list):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                yield file, node.name, ast.unparse(node.args) + "\n".join(map(ast.unparse, body))


def test_fixtures_that_tests_share_are_described_once():
    found = list(fixtures())
    assert len(found) > 30
    assert not [body for body, times in Counter(body for _, _, body in found).items() if times > 1]
    shared = {name for file, name, _ in found if file.name == "conftest.py"}
    again = [(file, name) for file, name, _ in found if name in shared and file.name != "conftest.py"]
    assert again == []


def test_documents_name_tests_that_exist():
    places = [
        (page, name) for page in DOCUMENTS for name in re.findall(r"\btests/[\w/.]+\.py\b", page.read_text("utf-8"))
    ]
    assert len(places) > 10
    assert not [(page.name, name) for page, name in places if not (ROOT / name).is_file()]
