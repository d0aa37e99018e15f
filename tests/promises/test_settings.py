"""Settings of every plug-in: flags, TOML, JSON and Python say the same; keys hold what differs, and notice a change."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

import click
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from pocketrec import registry, settings
from pocketrec.command import options
from pocketrec.errors import ConfigError
from pocketrec.families.evolution import Evolution
from pocketrec.families.retraining import Retrain, Start
from pocketrec.families.thresholds import ThresholdSearch
from pocketrec.methods.opt_embed import OptEmbed
from pocketrec.methods.pep import PEP
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

PLUGINS = [(axis, name) for axis in ("sources", "backbones", "methods") for name in registry.modules(axis)]
DEFAULTS = Path(__file__).parent / "defaults.json"


def values(setting: settings.Setting) -> st.SearchStrategy[Any]:
    """Values of a setting, most of them legal."""
    hint, own = setting.type, st.just(setting.default)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if hint is bool:
        return st.booleans()
    if hint in (int, int | None):
        return own | st.integers(1, 8)
    if hint in (float, float | None):
        return own | st.floats(0, 1, allow_nan=False).map(lambda v: round(v, 6))
    if hint == tuple[int, ...]:
        return own | st.lists(st.integers(1, 64), min_size=1, max_size=3).map(tuple)
    return own


def drawn(data: st.DataObject, cls: type[Any]) -> Any:
    """An instance with some settings changed, or the defaults where they do not go together."""
    chosen = {s.name: data.draw(values(s), label=s.name) for s in settings.leaves(cls)}
    try:
        return settings.build(cls, {n: v for n, v in chosen.items() if data.draw(st.booleans())})
    except ConfigError:
        return cls()


def toml(table: dict[str, Any], where: str = "") -> str:
    """A table as TOML; what is ``None`` is left out."""
    plain = {n: v for n, v in table.items() if v is not None and not isinstance(v, dict)}
    lines = [f"{where}{n} = {json.dumps(v)}" for n, v in plain.items()]
    return "\n".join([*lines, *(toml(v, f"{where}{n}.") for n, v in table.items() if isinstance(v, dict))])


@pytest.mark.parametrize(("axis", "name"), PLUGINS)
@hypothesis_settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_flags_toml_and_json_say_the_same(axis, name, data):
    cls = registry.load(axis, name)
    plug = drawn(data, cls)
    document = json.loads(json.dumps(settings.to_json(plug)))
    assert settings.from_json(cls, document) == plug
    assert settings.build(cls, settings.flat(plug)) == plug
    usual, hints = ({s.name: getattr(s, what) for s in settings.leaves(cls)} for what in ("default", "type"))
    read = settings.flattened("", tomllib.loads(toml(document)), cls)
    assert settings.build(cls, {n: settings.checked(n, v, hints[n]) for n, v in read.items()}) == plug
    command = click.Command("plug", params=[options.option(s) for s in settings.leaves(cls)])
    said = [(s, v) for s in settings.leaves(cls) if (v := settings.flat(plug)[s.name]) != usual[s.name]]
    flags = command.make_context("plug", [part for s, v in said for part in flag(s, v)]).params
    assert options.build(cls, flags) == plug


def flag(setting: settings.Setting, value: Any) -> list[str]:
    """How the user would give a value."""
    if setting.type is bool:
        return [setting.flag if value else f"--no-{setting.flag[2:]}"]
    return [setting.flag, "" if value == () else settings.spell(value)]


@dataclass(frozen=True)
class Inner:
    """A group.

    Args:
        size: of it.
        kind: which one.
    """

    version: ClassVar[int] = 1

    size: int = 3
    kind: Literal["big", "small"] = "big"

    def __post_init__(self) -> None:
        settings.check(self, size=1)


@dataclass(frozen=True)
class Outer:
    """A class with groups.

    Args:
        dim: width.
        inner: a group that starts otherwise.
        other: a group that may be missing.
    """

    dim: int = 2
    inner: Inner = field(default=Inner(size=5))
    other: Inner | None = None


def test_a_group_keeps_the_defaults_of_who_holds_it():
    assert settings.build(Outer, {"inner.kind": "small"}) == Outer(inner=Inner(5, "small"))
    assert settings.build(Outer, {"other.size": 4}) == Outer(other=Inner(4))
    assert {s.name: s.default for s in settings.leaves(Outer)}["inner.size"] == 5
    assert [s.flag for s in settings.leaves(Outer)] == [
        "--dim", "--inner-size", "--inner-kind", "--other-size", "--other-kind",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"inner.sise": 4}, ["sise", "`size`"]),
        ({"innr.size": 4}, ["innr", "`inner`"]),
        ({"dim.size": 4}, ["dim", "no group"]),
        ({"inner.size": 0}, ["`inner`", "`size` must be at least 1", "size=0"]),
        ({"inner.kind": "huge"}, ["`kind` must be one of big, small", "'huge'"]),
    ],
)
def test_what_is_wrong_is_named_with_its_place(values, words):
    with pytest.raises(ConfigError) as caught:
        settings.build(Outer, values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_document_of_another_type_is_refused():
    with pytest.raises(ConfigError, match=r"`here.inner.size`: .*integer.*'4'"):
        settings.from_json(Outer, {"inner": {"size": "4"}}, "here")
    with pytest.raises(ConfigError, match=r"`here.inner` must be a table"):
        settings.from_json(Outer, {"inner": 4}, "here")


def test_keys_hold_what_differs_and_versions_above_one(monkeypatch):
    assert settings.key(Outer()) == {"name": "Outer"}
    assert settings.key(Outer(3, Inner(5, "small"))) == {"name": "Outer", "dim": 3, "inner": {"kind": "small"}}
    assert settings.key(Outer(inner=Inner())) == {"name": "Outer", "inner": {"size": 3}}
    assert settings.named_key(Outer, {"inner.size": 5, "dim": 3}) == {"name": "Outer", "settings": {"dim": 3}}
    monkeypatch.setattr(Inner, "version", 2)
    assert settings.key(Outer()) == {"name": "Outer", "inner": {"version": 2}}
    assert settings.named_key(Outer, {})["versions"] == {"inner": 2, "other": 2}


def defaults(cls: type[Any]) -> dict[str, Any]:
    """Defaults and version of a class."""
    return {"version": getattr(cls, "version", 1), "defaults": json.loads(json.dumps(settings.to_json(cls())))}


def test_a_default_that_changes_raises_the_version():
    """Stored work is known by what differs from the defaults: a new default under the old version would meet it.

    New settings may come; whoever changes a default raises ``version`` and writes both into ``tests/defaults.json``.
    """
    known = json.loads(DEFAULTS.read_text())
    classes = {name: registry.load(axis, name) for axis, name in PLUGINS if axis != "sources"} | {
        cls.__name__: cls for cls in (Start, Retrain, ThresholdSearch, Evolution, Training)
    }
    assert known.keys() == classes.keys()
    for name, cls in classes.items():
        now = defaults(cls)
        assert now["version"] == known[name]["version"], name
        shared = known[name]["defaults"].keys() & now["defaults"].keys()
        assert {n: now["defaults"][n] for n in shared} == {n: known[name]["defaults"][n] for n in shared}, name
        assert known[name]["defaults"].keys() <= now["defaults"].keys(), name


def test_methods_copy_few_settings():
    """Names of the fields of all methods; groups count once."""
    names = {f.name for _, n in PLUGINS if _ == "methods" for f in fields(registry.load("methods", n))}
    assert len(names) <= 65
    assert not {f.name for n in registry.modules("methods") for f in fields(registry.load("methods", n))} & {"training"}


def test_small_is_a_plug_in_of_the_same_class():
    for axis, name in PLUGINS:
        if axis != "sources":
            plug = registry.load(axis, name)()
            assert type(plug.small()) is type(plug)
            assert is_dataclass(plug.small())
    assert OptEmbed().small().search.generations < OptEmbed().search.generations


def test_who_needs_the_trained_model_says_so():
    expected = {"fresh": "fresh", "trained": "trained"}
    assert {kind: PEP(start=Start(kind)).starts_from for kind in expected} == expected
    assert registry.load("methods", "qr")(start=Start("taught")).starts_from == "trained"
    assert registry.load("methods", "shaver")().starts_from == "trained"


def test_a_run_with_another_training_shares_all_else(tmp_path):
    with Run(tmp_path / "run", training=Training(epochs=3)) as run:
        other = run.with_training([Training(epochs=1), Training(epochs=2)])
        assert [s.epochs for s in other.stages("ctr")] == [1, 2]
        assert [s.epochs for s in run.stages("ctr")] == [3]
        assert other.steps == run.steps
    assert Run(None).stages("cf") == (Training.default("cf"),)
