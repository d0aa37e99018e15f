"""The parts of a plan: data sets, backbones and methods with their settings and search spaces, read and built."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pocketrec import registry, settings
from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.data.encode import encode
from pocketrec.errors import ConfigError
from pocketrec.files import Lock, digest
from pocketrec.training.loop import Training
from pocketrec.training.run import waited

if TYPE_CHECKING:
    from pocketrec.models.backbone import Backbone
    from pocketrec.schema import Task


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

    def examples(self) -> Iterator[dict[str, Any]]:
        """Points of the space in which every example of every setting occurs."""
        spaces = {name: space.values() for name, space in self.space().items()}
        first = {name: values[0] for name, values in spaces.items()}
        yield first
        yield from ({**first, name: value} for name, values in spaces.items() for value in values[1:])

    def key(self, plugin: type[Any], task: Task) -> dict[str, Any]:
        """What a result depends on: what differs from the defaults of the plug-in, and of the task's training."""
        usual = settings.flat(Training.default(task))
        first = self.training[0] if self.training else {}
        changed = [{n: v for n, v in {**first, **s}.items() if v != usual[n]} for s in self.training]
        stages = [spelled(stage) for stage in changed] if len(changed) > 1 or any(changed) else []
        version = {"training version": Training.version} if Training.version > 1 else {}
        return {**settings.named_key(plugin, spelled(self.settings)), "training": stages, **version}


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
        source = settings.build(registry.load("sources", self.source), self.settings)
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
    return settings.build(registry.load("backbones", recipe.plugin), recipe.config(point))


def build_method(recipe: Recipe, point: Point) -> Method:
    """The method of a recipe at a point of its space."""
    return settings.build(registry.load("methods", recipe.plugin), recipe.config(point))


def build_training(task: Task, stages: Sequence[Settings]) -> tuple[Training, ...]:
    """The stages of a training; at least one."""
    return tuple(dataclasses.replace(Training.default(task), **stage) for stage in stages or ({},))


def read_data(label: str, entry: Any) -> DataRecipe:
    """One ``[data.LABEL]``."""
    where = f"data.{label}"
    entry = _table(where, entry)
    name = entry.get("source", label)
    plugin = _plugin("sources", name, f"{where}.source")
    own = {s.name: s.type for s in settings.leaves(plugin)}
    keywords = _keywords()
    plain = ("raw", "split_by_seed", "trials", "budgets", "seeds", "bake")
    settings.known(where, entry, ["source", *plain, *own, *keywords])
    hints = get_type_hints(DataRecipe)
    given = {n: settings.checked(f"{where}.{n}", entry[n], hints[n]) for n in plain if n in entry}
    if "raw" not in given and not plugin.generates:
        raise ConfigError(f"`{where}.raw` is missing: the source {name!r} reads a file; name it below POCKETREC_DATA.")
    given_source = {n: settings.checked(f"{where}.{n}", v, own[n]) for n, v in entry.items() if n in own}
    encoding = {
        n: settings.checked(f"{where}.{n}", v, keywords[n]) for n, v in entry.items() if n in keywords and n not in own
    }
    return DataRecipe(label, name, settings=given_source, encoding=encoding, **given)


def _keywords() -> dict[str, Any]:
    """Keywords of ``encode`` that a plan may give."""
    return {s.name: s.type for s in settings.keywords(encode, skip=("seed", "progress"))} | {"test": str, "valid": str}


def read_recipe(axis: Literal["backbone", "method"], label: str, entry: Any, data: Sequence[str]) -> Recipe:
    """One ``[backbone.LABEL]`` or ``[method.LABEL]``."""
    where = f"{axis}.{label}"
    entry = _table(where, entry)
    plugin = _plugin("backbones" if axis == "backbone" else "methods", entry.get("is", label), f"{where}.is")
    changes = _table(f"{where}.on", entry.get("on", {}))
    settings.known(f"{where}.on", changes, data)
    only = settings.checked(f"{where}.only", entry.get("only", []), tuple[str, ...])
    settings.known(f"{where}.only", dict.fromkeys(only), data)
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
    settings.known(f"{where}.backbone", changes, list(backbones))
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
    trains = not issubclass(plugin, Method) or plugin.trains
    given = settings.flattened(where, entry, plugin, ["training"] if trains else [])
    hints = {s.name: s.type for s in settings.leaves(plugin)}
    own = {n: _setting(f"{where}.{n}", v, hints[n]) for n, v in given.items()}
    raw = entry.get("training", []) if trains else []
    stages = [_table(f"{where}.training", s) for s in (raw if isinstance(raw, list) else [raw])]
    hints = {s.name: s.type for s in settings.leaves(Training)}
    for stage in stages:
        settings.known(f"{where}.training", stage, list(hints))
    training = tuple({n: _setting(f"{where}.training.{n}", v, hints[n]) for n, v in stage.items()} for stage in stages)
    if any(isinstance(v, Space) for stage in training[1:] for v in stage.values()):
        raise ConfigError(f"`{where}.training`: only the first stage can be searched; give the later ones values.")
    recipe = Recipe(label, plugin.name, own, training)
    _try(where, plugin, recipe)
    return recipe


def _try(where: str, plugin: type[Any], recipe: Recipe) -> None:
    """Build the plug-in and its training once, at an end of every space, so that a bad value is found now."""
    for end in (0, -1):
        point = {name: space.values()[end] for name, space in recipe.space().items()}
        try:
            settings.build(plugin, recipe.config(point))
            for stage in recipe.stages(point):
                Training(**stage)
        except ConfigError as error:
            raise ConfigError(f"`{where}`: {error}") from error


def _setting(where: str, value: Any, hint: Any) -> Any:
    """A value, or a space whose values are checked."""
    if not isinstance(value, dict):
        return settings.checked(where, value, hint)
    settings.known(where, value, ["low", "high", "log", "step", "choices"])
    if "choices" in value:
        if not isinstance(value["choices"], list) or not value["choices"] or len(value) > 1:
            raise ConfigError(f"`{where}` must be like {{ choices = [0, 1] }}, but got {value}.")
        return Categorical(tuple(settings.checked(where, v, hint) for v in value["choices"]))
    space = _range(value)
    if space is None:
        raise ConfigError(
            f"`{where}` must be a value, {{ choices = [...] }} or {{ low = 1e-4, high = 1e-2, log = true }} with "
            f"low < high, but got {value}."
        )
    for end in space.values():
        settings.checked(where, end, hint)
    return space


def _range(value: Mapping[str, Any]) -> Range | None:
    """The range that a table says, if it is a sound one."""
    try:
        space = Range(**value)
        sound = space.low < space.high and (not space.log or space.low > 0) and (space.step is None or space.step > 0)
    except TypeError:
        return None
    return space if sound else None


def _plugin(axis: registry.Axis, name: Any, where: str) -> type[Any]:
    try:
        return registry.load(axis, str(name))
    except ConfigError as error:
        raise ConfigError(f"`{where}`: {error}") from error


def _table(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ConfigError(f"`{where}` must be a table, but got {entry!r}.")
    return entry


def _filled(settings: Settings, point: Point, prefix: str) -> dict[str, Any]:
    """Settings with spaces replaced by the values at a point; a space that the point leaves out is left out."""
    chosen = {n: point.get(f"{prefix}{n}") if isinstance(v, Space) else v for n, v in settings.items()}
    return {n: v for n, v in chosen.items() if not (isinstance(settings[n], Space) and v is None)}


def spelled(values: Settings) -> dict[str, Any]:
    """Settings with spaces as JSON has them."""
    return {n: dataclasses.asdict(v) if isinstance(v, Space) else v for n, v in values.items()}


def _raw(name: str) -> Path:
    """A raw file: absolute, or below the folder that ``POCKETREC_DATA`` names, or below the present one."""
    path = Path(os.environ.get("POCKETREC_DATA", ".")) / name
    if not path.exists():
        raise ConfigError(f"Expected the raw file {path}, but there is none; set POCKETREC_DATA to the folder of data.")
    return path
