"""Every public name explains itself, and every example does what it shows."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import pocketrec

ROOT = Path(__file__).parents[2]
MODULES = sorted(m.name for m in pkgutil.walk_packages(pocketrec.__path__, "pocketrec.") if "_library" not in m.name)


def members(module):
    return [
        (name, value)
        for name, value in inspect.getmembers(module)
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_explained(name):
    module = importlib.import_module(name)
    assert (module.__doc__ or "").strip(), f"{name} has no docstring"
    for symbol, value in members(module):
        text = inspect.getdoc(value) or ""
        assert re.match(r"\S.*[.:]", text), f"{name}.{symbol} needs a first line"


@pytest.mark.parametrize("name", ["compress", "encode", "measure", "open", "train", "Run", "Dataset", "Budget"])
def test_entry_points_have_an_example(name):
    assert ">>>" in (inspect.getdoc(getattr(pocketrec, name)) or ""), f"pocketrec.{name} needs an example"


def readme_example() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


def test_the_readme_example_is_ten_lines_and_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = readme_example()
    assert len(code.strip().splitlines()) <= 10
    smaller = code.replace("Synthetic()", "Synthetic(rows=4000, cardinalities=(200, 50, 20))")
    scope: dict = {}
    exec(compile(smaller, "README.md", "exec"), scope)  # noqa: S102
    assert (tmp_path / "clicks.safetensors").is_file()


@pytest.mark.parametrize(
    "page",
    sorted(
        page
        for page in (p.relative_to(ROOT).as_posix() for p in ROOT.glob("**/*.md"))
        if not any(part.startswith(".") for part in page.split("/"))
    ),
)
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}, which is not there"


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_compile(script):
    path = ROOT / "examples" / script
    compile(path.read_text(encoding="utf-8"), str(path), "exec")
