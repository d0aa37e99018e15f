"""What a study is: data sets x backbones x methods x budgets x seeds, read from a small TOML file.

A setting of a backbone or method is a value, or what to search: ``{ low = 1e-4, high = 1e-2, log = true }`` or
``{ choices = [0, 1, 2] }``. Every key is checked against the plug-in before anything runs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from pocketrec import registry
from pocketrec.dataset import Dataset, encode
from pocketrec.errors import ConfigError
from pocketrec.files import Lock, digest
from pocketrec.method import Budget, Method
from pocketrec.run import waited
from pocketrec.train import Training

if TYPE_CHECKING:
    from pocketrec.backbone import Backbone

PLANS = Path(__file__).parent / "plans"
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
class Choices:
    """Values to search, without an order."""

    choices: tuple[Any, ...]

    def values(self) -> tuple[Any, ...]:
        """All of them."""
        return self.choices


Space = Range | Choices


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
class Data:
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


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole study.

    Attributes:
        name: of the study.
        data: by label.
        backbones: by label.
        methods: by label.
        budgets: as :class:`~pocketrec.method.Budget` reads them.
        seeds: each is a training, and a split where a data set says so; the first one is searched on.
        brief: budgets that get the first seed alone.
        trials: of each search; 0 takes every space at its plug-in's default.
        at_once: trials that are drawn together, so that they can run side by side; more of them learn less each.
        device: where models are trained.
        threads: of each cell.
        predictions: whether test predictions are kept, which intervals need.
        efficiency: profiles of time and memory to take: ``server``, ``edge``.
        efficiency_budget: the budget at which they are taken.
        anatomy: whether frequency and magnitude of the original's rows are compared.
        around: changes of backbones where a method trains them, by labels of both.
        within: budgets of the methods that do not get all, by label.
    """

    name: str
    data: Mapping[str, Data]
    backbones: Mapping[str, Recipe]
    methods: Mapping[str, Recipe]
    budgets: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    brief: tuple[str, ...] = ()
    trials: int = 30
    at_once: int = 1
    device: str = "cpu"
    threads: int = 1
    predictions: bool = True
    efficiency: tuple[Literal["server", "edge"], ...] = ()
    efficiency_budget: str = "sparsity=0.8"
    anatomy: bool = False
    around: Mapping[str, Mapping[str, Recipe]] = field(default_factory=dict)
    within: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a TOML file, or a shipped plan by its name.

        Raises:
            ConfigError: the file is no plan; the message names the key and the nearest valid one.

        Example:
            >>> Plan.read("smoke").name
            'smoke'
        """
        path = Path(path)
        shipped = sorted(p.stem for p in PLANS.glob("*.toml"))
        if not path.exists() and str(path) in shipped:
            path = PLANS / f"{path}.toml"
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"Expected a plan, but there is no file {path}; name a TOML file or one of the shipped plans: "
                f"{', '.join(shipped)}."
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}.") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}; name a TOML file.") from error
        return parse(document, path.stem)

    def pairs_of(self) -> Iterator[tuple[Data, Recipe]]:
        """Every data set with every backbone of its task."""
        for data in self.data.values():
            task = registry.load("sources", data.source).task
            for backbone in self.backbones.values():
                if registry.load("backbones", backbone.plugin).task == task and backbone.fits(data.label):
                    yield data, backbone.at(data.label)

    def methods_of(self, data: Data) -> list[str]:
        """Labels of the methods for a data set."""
        return [label for label, method in self.methods.items() if method.fits(data.label)]

    def budgets_of(self, data: Data, method: str | None = None) -> tuple[str, ...]:
        """Budgets of the cells of a data set, or of one method there."""
        budgets = data.budgets or self.budgets
        own = self.within.get(method, ()) if method is not None else ()
        return tuple(b for b in budgets if not own or b in own)

    def seeds_of(self, data: Data, budget: str | None = None) -> tuple[int, ...]:
        """Seeds of the cells of a data set, or of one budget there."""
        seeds = data.seeds or self.seeds
        return seeds[:1] if budget in self.brief else seeds

    def trials_of(self, data: Data) -> int:
        """Trials of each search on a data set."""
        return self.trials if data.trials is None else data.trials

    def shifted(self, seed: int = 0, threads: int | None = None, device: str = "cpu") -> Plan:
        """The same study with all its seeds shifted, other threads, or another device."""
        data = {
            label: d if d.seeds is None else dataclasses.replace(d, seeds=tuple(s + seed for s in d.seeds))
            for label, d in self.data.items()
        }
        return dataclasses.replace(
            self,
            data=data,
            seeds=tuple(s + seed for s in self.seeds),
            threads=threads or self.threads,
            device=self.device if device == "cpu" else device,
        )

    def to_json(self) -> dict[str, Any]:
        """A document that says all of it."""
        return dataclasses.asdict(self)


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


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse(document: Mapping[str, Any], name: str = "study") -> Plan:
    """A plan from its TOML document, every key of it checked."""
    tables = {"data": "data", "backbone": "backbones", "method": "methods"}
    plain = [f.name for f in dataclasses.fields(Plan) if f.name not in (*tables.values(), "around", "within")]
    _known("", document, [*tables, *plain])
    for table in tables:
        if not isinstance(document.get(table), dict) or not document[table]:
            raise ConfigError(f"A plan needs at least one table [{table}.NAME], but has none; add one.")
    document = {**document, **{axis: _alike(axis, document[axis]) for axis in ("backbone", "method")}}
    labels = list(document["data"])
    values = {n: v for n, v in document.items() if n in plain}
    checked = {n: _checked(n, v, get_type_hints(Plan)[n]) for n, v in values.items()}
    backbones = {label: _recipe("backbone", label, e, labels) for label, e in document["backbone"].items()}
    plan = Plan(
        **{"name": name, "budgets": (), **checked},
        data={label: _data(label, entry) for label, entry in document["data"].items()},
        backbones=backbones,
        methods={label: _recipe("method", label, _plain(e), labels) for label, e in document["method"].items()},
        around={label: _around(f"method.{label}", label, e, backbones) for label, e in document["method"].items()},
        within={
            label: _checked(f"method.{label}.budgets", e["budgets"], tuple[str, ...])
            for label, e in document["method"].items()
            if isinstance(e, dict) and "budgets" in e
        },
    )
    _sound(plan)
    return plan


def _alike(axis: str, tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of an axis; one that is ``like`` another has the keys of that one where it has none of its own."""
    found = dict(tables)
    for label, entry in tables.items():
        if isinstance(entry, dict) and "like" in entry:
            others = [name for name, other in tables.items() if isinstance(other, dict) and "like" not in other]
            if entry["like"] not in others:
                raise ConfigError(
                    f"`{axis}.{label}.like` must name a table that stands on its own, one of {', '.join(others)}, but "
                    f"got {entry['like']!r}."
                )
            own = {name: value for name, value in entry.items() if name != "like"}
            found[label] = {"is": entry["like"], **tables[entry["like"]], **own}
    return found


def _sound(plan: Plan) -> None:
    """What single keys cannot tell."""
    for data in plan.data.values():
        if not (budgets := plan.budgets_of(data)):
            raise ConfigError("`budgets` must name at least one budget, for instance ['sparsity=0.8', '5%', '4MiB'].")
        for budget in budgets:
            Budget.parse(budget)
        if not (seeds := plan.seeds_of(data)) or len(set(seeds)) < len(seeds):
            raise ConfigError(f"`seeds` must be different integers, at least one, but got {list(seeds)}.")
    every = dict.fromkeys(b for data in plan.data.values() for b in plan.budgets_of(data))
    _known("brief", dict.fromkeys(plan.brief), list(every))
    for label, budgets in plan.within.items():
        _known(f"method.{label}.budgets", dict.fromkeys(budgets), list(every))
    Budget.parse(plan.efficiency_budget)
    if plan.trials < 0 or plan.at_once < 1 or plan.threads < 1:
        raise ConfigError(
            "`trials` must be at least 0, `at_once` and `threads` at least 1, but got "
            f"{plan.trials}, {plan.at_once} and {plan.threads}."
        )
    if ORIGINAL in plan.methods:
        raise ConfigError(f"`method.{ORIGINAL}` is the uncompressed model, which every study has; remove the table.")
    if not list(plan.pairs_of()):
        raise ConfigError("No backbone of the plan fits the task of any of its data sets; add one that does.")


def _data(label: str, entry: Any) -> Data:
    """One ``[data.LABEL]``."""
    where = f"data.{label}"
    entry = _table(where, entry)
    name = entry.get("source", label)
    plugin = _plugin("sources", name, f"{where}.source")
    own = {f.name: hint for f, hint in _fields(plugin)}
    keywords = _keywords()
    plain = ("raw", "split_by_seed", "trials", "budgets", "seeds", "bake")
    _known(where, entry, ["source", *plain, *own, *keywords])
    hints = get_type_hints(Data)
    given = {n: _checked(f"{where}.{n}", entry[n], hints[n]) for n in plain if n in entry}
    if "raw" not in given and not plugin.generates:
        raise ConfigError(f"`{where}.raw` is missing: the source {name!r} reads a file; name it below POCKETREC_DATA.")
    settings = {n: _checked(f"{where}.{n}", v, own[n]) for n, v in entry.items() if n in own}
    encoding = {n: _checked(f"{where}.{n}", v, keywords[n]) for n, v in entry.items() if n in keywords and n not in own}
    return Data(label, name, settings=settings, encoding=encoding, **given)


def _keywords() -> dict[str, Any]:
    """Keywords of ``encode`` that a plan may give."""
    hints = get_type_hints(encode)
    hints |= {"test": str, "valid": str}
    names = [n for n, p in signature(encode).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
    return {n: hints[n] for n in names if n not in ("seed", "progress")}


def _recipe(axis: Literal["backbone", "method"], label: str, entry: Any, data: Sequence[str]) -> Recipe:
    """One ``[backbone.LABEL]`` or ``[method.LABEL]``."""
    where = f"{axis}.{label}"
    entry = _table(where, entry)
    plugin = _plugin("backbones" if axis == "backbone" else "methods", entry.get("is", label), f"{where}.is")
    changes = _table(f"{where}.on", entry.get("on", {}))
    _known(f"{where}.on", changes, data)
    only = _checked(f"{where}.only", entry.get("only", []), tuple[str, ...])
    _known(f"{where}.only", dict.fromkeys(only), data)
    plain = {n: v for n, v in entry.items() if n not in ("is", "on", "only")}
    recipe = _settings(where, label, plugin, plain)
    on = {d: _settings(f"{where}.on.{d}", label, plugin, _table(f"{where}.on.{d}", e)) for d, e in changes.items()}
    return dataclasses.replace(recipe, on=on, only=only)


def _plain(entry: Any) -> Any:
    """A method's table without its budgets and its changes of backbones."""
    return {n: v for n, v in entry.items() if n not in ("backbone", "budgets")} if isinstance(entry, dict) else entry


def _around(where: str, label: str, entry: Mapping[str, Any], backbones: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """``[method.LABEL.backbone.LABEL]``: changes of a backbone where this method trains it."""
    changes = _table(f"{where}.backbone", entry.get("backbone", {}))
    _known(f"{where}.backbone", changes, list(backbones))
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
    _known(where, entry, [*own, *(["training"] if trains else [])])
    settings = {n: _setting(f"{where}.{n}", v, own[n]) for n, v in entry.items() if n in own}
    raw = entry.get("training", [])
    stages = [_table(f"{where}.training", s) for s in (raw if isinstance(raw, list) else [raw])]
    hints = {f.name: hint for f, hint in _fields(Training)}
    for stage in stages:
        _known(f"{where}.training", stage, list(hints))
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
        return _checked(where, value, hint)
    _known(where, value, ["low", "high", "log", "step", "choices"])
    if "choices" in value:
        if not isinstance(value["choices"], list) or not value["choices"] or len(value) > 1:
            raise ConfigError(f"`{where}` must be like {{ choices = [0, 1] }}, but got {value}.")
        return Choices(tuple(_checked(where, v, hint) for v in value["choices"]))
    space = _range(value)
    if space is None:
        raise ConfigError(
            f"`{where}` must be a value, {{ choices = [...] }} or {{ low = 1e-4, high = 1e-2, log = true }} with "
            f"low < high, but got {value}."
        )
    for end in space.values():
        _checked(where, end, hint)
    return space


def _range(value: Mapping[str, Any]) -> Range | None:
    """The range that a table says, if it is a sound one."""
    try:
        space = Range(**value)
        sound = space.low < space.high and (not space.log or space.low > 0) and (space.step is None or space.step > 0)
    except TypeError:
        return None
    return space if sound else None


def _checked(where: str, value: Any, hint: Any) -> Any:
    """A TOML value as the type that a field has."""
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError) as error:
        text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"`{where}`: {text}; got {value!r}.") from error


def _known(where: str, entry: Mapping[str, Any], known: Sequence[str]) -> None:
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
