"""The parts of a plan: data sets, backbones and methods with their settings and search spaces, read and built."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from pocketrec import registry
from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.data.encode import encode
from pocketrec.errors import ConfigError
from pocketrec.files import Lock, digest
from pocketrec.training.loop import Training
from pocketrec.training.run import waited

if TYPE_CHECKING:
    from pocketrec.models.backbone import Backbone


ORIGINAL = "original"

DENSE = "dense"

STAGE = "training."

Settings = Mapping[str, Any]

Point = Mapping[str, Any]
"""Values of searched settings by name; those of the first training stage begin with ``training.``."""


@dataclass(frozen=True)
class Range:
    """Numbers in ``[low, high]`` to search: uniformly or by their logarithm; whole ones, or every ``step``."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether only integers are meant."""
        return all(isinstance(v, int) for v in (self.low, self.high, self.step or 1))

    def values(self) -> tuple[Any, ...]:
        """Examples, to be checked: the ends."""
        return self.low, self.high


@dataclass(frozen=True)
class Categorical:
    """Values to search, without an order."""

    choices: tuple[Any, ...]

    def values(self) -> tuple[Any, ...]:
        """All of them."""
        return self.choices


Space = Range | Categorical


@dataclass(frozen=True)
class Recipe:
    """A backbone or a method of a plan: the plug-in, its settings, its training, and what is searched of both.

    Attributes:
        label: what the plan calls it.
        plugin: its name in the registry.
        settings: values and spaces by field.
        training: stages, each from the best weights of the one before; only the first is searched, and what a later one
            does not say is as in the first.
        on: changes for single data sets: ``settings`` and ``training`` by data label.
        only: data sets that it is for; all where it names none.
    """

    label: str
    plugin: str
    settings: Settings = field(default_factory=dict)
    training: tuple[Settings, ...] = ()
    on: Mapping[str, Recipe] = field(default_factory=dict)
    only: tuple[str, ...] = ()

    def fits(self, data: str) -> bool:
        """Whether it is for a data set."""
        return not self.only or data in self.only

    def at(self, data: str) -> Recipe:
        """The recipe for one data set, which the changes for others leave as it is."""
        return dataclasses.replace(self, on={}).changed(self.on.get(data))

    def changed(self, other: Recipe | None) -> Recipe:
        """The recipe with the settings and training of another one, where there is one, above its own."""
        if other is None:
            return self
        first = {**(self.training[0] if self.training else {}), **(other.training[0] if other.training else {})}
        later = other.training[1:] or self.training[1:]
        stages = (first, *later) if first or later else ()
        settings = {**self.settings, **other.settings}
        return Recipe(self.label, self.plugin, settings, stages, only=self.only)

    def space(self) -> dict[str, Space]:
        """What is searched, by name; a stage's settings begin with ``training.``."""
        first = self.training[0] if self.training else {}
        named = {**self.settings, **{f"{STAGE}{name}": value for name, value in first.items()}}
        return {name: value for name, value in named.items() if isinstance(value, Space)}

    def config(self, point: Point) -> dict[str, Any]:
        """The plug-in's settings with the searched ones at ``point``; those it does not name keep their defaults."""
        return _filled(self.settings, point, "")

    def stages(self, point: Point) -> tuple[dict[str, Any], ...]:
        """The training's settings with the searched ones at ``point``."""
        if not self.training:
            return ()
        first = _filled(self.training[0], point, STAGE)
        return (first, *({**first, **stage} for stage in self.training[1:]))

    def to_json(self) -> dict[str, Any]:
        """A document that says what a result depends on."""
        return {n: v for n, v in dataclasses.asdict(self).items() if n != "only"}


@dataclass(frozen=True)
class DataRecipe:
    """A data set of a plan: a source, a raw file below ``POCKETREC_DATA``, and how it is encoded.

    Attributes:
        label: what the plan calls it.
        source: name in the registry.
        raw: the raw file, or ``None`` for a generator.
        settings: fields of the source.
        encoding: keywords of :func:`pocketrec.encode`; ``test`` and ``valid`` are files below ``POCKETREC_DATA``.
        split_by_seed: each seed of the study splits the rows anew.
        trials: of this data set, instead of the plan's.
        budgets: likewise.
        seeds: likewise.
        bake: whether ranking models are propagated first, and their final vectors compressed.
    """

    label: str
    source: str
    raw: str | None = None
    settings: Settings = field(default_factory=dict)
    encoding: Settings = field(default_factory=dict)
    split_by_seed: bool = False
    trials: int | None = None
    budgets: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    bake: bool = False

    def open(self, folder: Path, seed: int) -> Dataset:
        """The encoded data set for one seed of the study; encoded where it is missing."""
        split = seed if self.split_by_seed else 0
        source = registry.load("sources", self.source)(**_tuples(self.settings))
        files = {name: _raw(value) for name, value in self.encoding.items() if name in ("test", "valid")}
        raw = None if self.raw is None else _raw(self.raw)
        out = self.place(folder, seed)
        folder.mkdir(parents=True, exist_ok=True)
        with waited(Lock(folder / f"{out.name}.lock")):
            return encode(source, raw, out, **{**self.encoding, **files, "seed": split})

    def place(self, folder: Path, seed: int) -> Path:
        """Where the encoded data set of a seed lies."""
        name = digest({**self.identity(), "split": seed if self.split_by_seed else 0})[:16]
        return folder / f"{self.label}-{name}"

    def identity(self) -> dict[str, Any]:
        """All that the encoded data depend on, but the seed."""
        kept = ("source", "raw", "settings", "encoding", "split_by_seed")
        return {name: getattr(self, name) for name in kept}


def build_backbone(recipe: Recipe, point: Point) -> Backbone:
    """The backbone of a recipe at a point of its space."""
    return registry.load("backbones", recipe.plugin)(**_tuples(recipe.config(point)))


def build_method(recipe: Recipe, point: Point, training: tuple[Training, ...]) -> Method:
    """The method of a recipe at a point of its space; one that trains gets ``training``."""
    plugin = registry.load("methods", recipe.plugin)
    config = _tuples(recipe.config(point))
    return plugin(**config, training=training) if plugin.trains else plugin(**config)


def build_training(task: Literal["ctr", "cf"], stages: Sequence[Settings]) -> tuple[Training, ...]:
    """The stages of a training; at least one."""
    return tuple(dataclasses.replace(Training.default(task), **stage) for stage in stages or ({},))


def read_data(label: str, entry: Any) -> DataRecipe:
    """One ``[data.LABEL]``."""
    where = f"data.{label}"
    entry = _table(where, entry)
    name = entry.get("source", label)
    plugin = _plugin("sources", name, f"{where}.source")
    own = {f.name: hint for f, hint in _fields(plugin)}
    keywords = _keywords()
    plain = ("raw", "split_by_seed", "trials", "budgets", "seeds", "bake")
    check_keys(where, entry, ["source", *plain, *own, *keywords])
    hints = get_type_hints(DataRecipe)
    given = {n: check_value(f"{where}.{n}", entry[n], hints[n]) for n in plain if n in entry}
    if "raw" not in given and not plugin.generates:
        raise ConfigError(f"`{where}.raw` is missing: the source {name!r} reads a file; name it below POCKETREC_DATA.")
    settings = {n: check_value(f"{where}.{n}", v, own[n]) for n, v in entry.items() if n in own}
    encoding = {
        n: check_value(f"{where}.{n}", v, keywords[n]) for n, v in entry.items() if n in keywords and n not in own
    }
    return DataRecipe(label, name, settings=settings, encoding=encoding, **given)


def _keywords() -> dict[str, Any]:
    """Keywords of ``encode`` that a plan may give."""
    hints = get_type_hints(encode)
    hints |= {"test": str, "valid": str}
    names = [n for n, p in signature(encode).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
    return {n: hints[n] for n in names if n not in ("seed", "progress")}


def read_recipe(axis: Literal["backbone", "method"], label: str, entry: Any, data: Sequence[str]) -> Recipe:
    """One ``[backbone.LABEL]`` or ``[method.LABEL]``."""
    where = f"{axis}.{label}"
    entry = _table(where, entry)
    plugin = _plugin("backbones" if axis == "backbone" else "methods", entry.get("is", label), f"{where}.is")
    changes = _table(f"{where}.on", entry.get("on", {}))
    check_keys(f"{where}.on", changes, data)
    only = check_value(f"{where}.only", entry.get("only", []), tuple[str, ...])
    check_keys(f"{where}.only", dict.fromkeys(only), data)
    plain = {n: v for n, v in entry.items() if n not in ("is", "on", "only")}
    recipe = _settings(where, label, plugin, plain)
    on = {d: _settings(f"{where}.on.{d}", label, plugin, _table(f"{where}.on.{d}", e)) for d, e in changes.items()}
    return dataclasses.replace(recipe, on=on, only=only)


def without_plan_keys(entry: Any) -> Any:
    """A method's table without its budgets and its changes of backbones."""
    return {n: v for n, v in entry.items() if n not in ("backbone", "budgets")} if isinstance(entry, dict) else entry


def read_around(where: str, label: str, entry: Mapping[str, Any], backbones: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """``[method.LABEL.backbone.LABEL]``: changes of a backbone where this method trains it."""
    changes = _table(f"{where}.backbone", entry.get("backbone", {}))
    check_keys(f"{where}.backbone", changes, list(backbones))
    if changes and not _plugin("methods", entry.get("is", label), f"{where}.is").trains:
        raise ConfigError(f"`{where}.backbone`: the method trains no model of its own; remove the table.")
    found = {}
    for name, change in changes.items():
        place = f"{where}.backbone.{name}"
        plugin = registry.load("backbones", backbones[name].plugin)
        found[name] = _settings(place, name, plugin, _table(place, change))
    return found


def _settings(where: str, label: str, plugin: type[Any], entry: Settings) -> Recipe:
    """Settings and training of a plug-in."""
    own = {f.name: hint for f, hint in _fields(plugin) if f.name != "training"}
    trains = not issubclass(plugin, Method) or plugin.trains
    check_keys(where, entry, [*own, *(["training"] if trains else [])])
    settings = {n: _setting(f"{where}.{n}", v, own[n]) for n, v in entry.items() if n in own}
    raw = entry.get("training", [])
    stages = [_table(f"{where}.training", s) for s in (raw if isinstance(raw, list) else [raw])]
    hints = {f.name: hint for f, hint in _fields(Training)}
    for stage in stages:
        check_keys(f"{where}.training", stage, list(hints))
    training = tuple({n: _setting(f"{where}.training.{n}", v, hints[n]) for n, v in stage.items()} for stage in stages)
    if any(isinstance(v, Space) for stage in training[1:] for v in stage.values()):
        raise ConfigError(f"`{where}.training`: only the first stage can be searched; give the later ones values.")
    recipe = Recipe(label, plugin.name, settings, training)
    _try(where, plugin, recipe)
    return recipe


def _try(where: str, plugin: type[Any], recipe: Recipe) -> None:
    """Build the plug-in and its training once, at an end of every space, so that a bad value is found now."""
    for end in (0, -1):
        point = {name: space.values()[end] for name, space in recipe.space().items()}
        try:
            plugin(**_tuples(recipe.config(point)))
            for stage in recipe.stages(point):
                Training(**stage)
        except ConfigError as error:
            raise ConfigError(f"`{where}`: {error}") from error


def _setting(where: str, value: Any, hint: Any) -> Any:
    """A value, or a space whose values are checked."""
    if not isinstance(value, dict):
        return check_value(where, value, hint)
    check_keys(where, value, ["low", "high", "log", "step", "choices"])
    if "choices" in value:
        if not isinstance(value["choices"], list) or not value["choices"] or len(value) > 1:
            raise ConfigError(f"`{where}` must be like {{ choices = [0, 1] }}, but got {value}.")
        return Categorical(tuple(check_value(where, v, hint) for v in value["choices"]))
    space = _range(value)
    if space is None:
        raise ConfigError(
            f"`{where}` must be a value, {{ choices = [...] }} or {{ low = 1e-4, high = 1e-2, log = true }} with "
            f"low < high, but got {value}."
        )
    for end in space.values():
        check_value(where, end, hint)
    return space


def _range(value: Mapping[str, Any]) -> Range | None:
    """The range that a table says, if it is a sound one."""
    try:
        space = Range(**value)
        sound = space.low < space.high and (not space.log or space.low > 0) and (space.step is None or space.step > 0)
    except TypeError:
        return None
    return space if sound else None


def check_value(where: str, value: Any, hint: Any) -> Any:
    """A TOML value as the type that a field has."""
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError) as error:
        text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"`{where}`: {text}; got {value!r}.") from error


def check_keys(where: str, entry: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keys that are none, with the nearest one that is."""
    for key in entry:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}."
            raise ConfigError(f"`{where + '.' if where else ''}{key}` is no key of a plan; {hint}")


def _plugin(axis: registry.Axis, name: Any, where: str) -> type[Any]:
    try:
        return registry.load(axis, str(name))
    except ConfigError as error:
        raise ConfigError(f"`{where}`: {error}") from error


def _table(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ConfigError(f"`{where}` must be a table, but got {entry!r}.")
    return entry


def _fields(plugin: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(plugin)
    return [(f, hints[f.name]) for f in dataclasses.fields(plugin)]


def _filled(settings: Settings, point: Point, prefix: str) -> dict[str, Any]:
    """Settings with spaces replaced by the values at a point; a space that the point leaves out is left out."""
    chosen = {n: point.get(f"{prefix}{n}") if isinstance(v, Space) else v for n, v in settings.items()}
    return {n: v for n, v in chosen.items() if not (isinstance(settings[n], Space) and v is None)}


def _tuples(settings: Settings) -> dict[str, Any]:
    """Lists as tuples: a configuration must be hashable."""
    return {n: tuple(v) if isinstance(v, list) else v for n, v in settings.items()}


def _raw(name: str) -> Path:
    """A raw file: absolute, or below the folder that ``POCKETREC_DATA`` names, or below the present one."""
    path = Path(os.environ.get("POCKETREC_DATA", ".")) / name
    if not path.exists():
        raise ConfigError(f"Expected the raw file {path}, but there is none; set POCKETREC_DATA to the folder of data.")
    return path
