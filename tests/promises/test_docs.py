"""Every public name explains itself, and every example does what it shows."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import pocketrec
from pocketrec import registry, settings

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


PAGES = sorted(
    page
    for page in (p.relative_to(ROOT).as_posix() for p in ROOT.glob("**/*.md"))
    if not any(part.startswith(".") for part in page.split("/"))
)
OF_TODAY = [page for page in PAGES if page != "CHANGELOG.md" and not page.startswith("bench/results/")]
"""Pages that speak of the tree as it is: neither of what was, nor of a run that is over."""

PLACES = (ROOT, ROOT / "src", ROOT / "src" / "pocketrec", ROOT / "src" / "pocketrec" / "format")
"""What a path on a page may start from."""


def quoted(page: str) -> list[str]:
    """What stands in backticks, the words of each block of code included."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)) + blocks


def resolved(name: str) -> object:
    """What a dotted name stands for.

    Raises:
        AttributeError: for nothing.
    """
    found, path = importlib.import_module("pocketrec"), "pocketrec"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if not hasattr(found, part) and inspect.ismodule(found):
            with contextlib.suppress(ModuleNotFoundError):
                importlib.import_module(path)
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", OF_TODAY)
def test_paths_on_pages_exist(page):
    words = {word for code in quoted(page) for word in code.split()}
    roots = "|".join(sorted(p.name for p in PLACES[2].iterdir() if p.is_dir() and not p.name.startswith("_")))
    pattern = (
        rf"(?:(?:src|tests|bench|docs|examples|pocketrec|{roots})/[\w./-]*\w/?|\w+(?:/\w+)*\.(?:py|inl|cpp|h|bin))"
    )
    paths = {word for word in words if re.fullmatch(pattern, word) and "NAME" not in word}
    lost = sorted(path for path in paths if not any((place / path).exists() for place in PLACES))
    assert not lost, f"{page} names {lost}, which are not there"


@pytest.mark.parametrize("page", OF_TODAY)
def test_names_on_pages_exist(page):
    for code in quoted(page):
        for name in re.findall(r"(?<![\w./-])(?:pocketrec|pr)(?:\.[A-Za-z_]\w*)+", code):
            resolved(re.sub(r"^pr\.", "pocketrec.", name))


@pytest.mark.parametrize("page", ["docs/methods.md", "docs/cli.md", "docs/studies.md"])
def test_settings_in_groups_exist(page):
    """``search.epochs`` and ``--search-epochs`` on a page are settings of a method."""
    classes = [registry.load("methods", name) for name in registry.modules("methods", installed=False)]
    known = {s.name: s.flag for cls in classes for s in settings.leaves(cls)}
    groups = {name.split(".")[0] for name in known if "." in name}
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(re.findall(rf"\b(?:{'|'.join(groups)})\.(?!db)[a-z_]+\b", text))
    flags = set(re.findall(rf"--(?:{'|'.join(groups)})-[a-z-]+\b", text))
    assert names | flags
    assert names <= known.keys()
    assert flags <= set(known.values())


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}, which is not there"


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_compile(script):
    path = ROOT / "examples" / script
    compile(path.read_text(encoding="utf-8"), str(path), "exec")
