"""What may import what: contracts, a light import, and plug-ins that can be removed one by one."""

from __future__ import annotations

import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pocketrec
from pocketrec import registry
from pocketrec.testing import stubs

ROOT = Path(__file__).parents[2]
PACKAGE = Path(pocketrec.__file__).parent
PLUGINS = [(axis, name) for axis in registry.AXES for name in registry.modules(axis)]


def python(code: str, path: Path | None = None, *flags: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path or PACKAGE.parent)}
    done = subprocess.run([sys.executable, *flags, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_contracts_hold():
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.parametrize(
    "code",
    [
        "import pocketrec",
        "import pocketrec.cli, pocketrec.runtime, pocketrec.registry, pocketrec.native, pocketrec.format.artifact",
        "import pocketrec; pocketrec.open, pocketrec.Schema, pocketrec.BudgetError, dir(pocketrec)",
        "import pocketrec.training.run, pocketrec.study.profiling.phase",
    ],
)
def test_the_device_side_loads_nothing_heavy(code):
    heavy = {"torch", "polars", "click", "rich", "matplotlib", "scipy", "sklearn"}
    assert python(f"{code}; import sys; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"], ["encode", "--help"]])
def test_help_loads_neither_torch_nor_polars(arguments):
    code = f"""
import sys
from pocketrec import cli
try:
    cli.main({arguments})
finally:
    sys.stderr.write(str(sorted({{"torch", "polars"}} & set(sys.modules))))
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]")
    assert "pocketrec" in done.stdout.lower()


@pytest.mark.parametrize("name", sorted(set(pocketrec.__all__)))
def test_public_names_load(name):
    assert getattr(pocketrec, name) is not None
    assert name in dir(pocketrec)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pocketrec.nonsense


def test_no_module_at_the_root_bears_the_name_of_a_verb():
    assert not {m.name for m in pkgutil.iter_modules(pocketrec.__path__)} & set(pocketrec.__all__) - set(registry.AXES)


def test_plug_ins_are_reached_by_class_name():
    for axis, name in PLUGINS:
        cls = registry.load(axis, name)
        assert getattr(getattr(pocketrec, axis), cls.__name__) is cls


@pytest.mark.parametrize("axis", registry.AXES)
def test_an_axis_completes_and_is_typed(axis):
    classes = [registry.load(axis, name).__name__ for name in registry.modules(axis)]
    assert dir(getattr(pocketrec, axis)) == sorted(classes)
    assert stubs.place(axis).read_text() == stubs.stub(axis), "run `python -m pocketrec.testing.stubs`"


def test_every_plug_in_can_be_removed(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "pocketrec", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
import importlib, pathlib, pkgutil, sys

def fresh():
    for name in [n for n in sys.modules if n.split(".")[0] == "pocketrec"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    return importlib.import_module("pocketrec")

for axis, plugin in {PLUGINS}:
    file = pathlib.Path({str(tmp_path)!r}, "pocketrec", axis, plugin + ".py")
    text = file.read_text()
    file.unlink()
    package = fresh()
    assert package.__file__.startswith({str(tmp_path)!r})
    for module in pkgutil.walk_packages(package.__path__, "pocketrec."):
        if "_library" not in module.name:
            importlib.import_module(module.name)
    registry = sys.modules["pocketrec.registry"]
    for other in ("sources", "backbones", "methods"):
        for name in registry.modules(other):
            registry.load(other, name)
    try:
        registry.load(axis, plugin)
    except sys.modules["pocketrec.errors"].ConfigError as error:
        print(plugin)
    file.write_text(text)
"""
    removed = python(code, tmp_path, "-B").split()
    assert removed == [name for _, name in PLUGINS]


def test_the_stub_names_what_the_package_does():
    stub = (Path(pocketrec.__file__).parent / "__init__.pyi").read_text(encoding="utf-8")
    homes = re.findall(r"^from (\S+) import (\w+) as \2$", stub, re.M)
    assert sorted(name for _, name in homes) == pocketrec.__all__
    assert {(m, n) for m, n in homes if n not in registry.AXES} == {
        (f"pocketrec.{module}", name) for name, module in pocketrec._MODULE.items()
    }
