"""What a study is: data sets x backbones x methods x budgets x seeds, read from a small TOML file.

A setting of a backbone or method is a value, or what to search: ``{ low = 1e-4, high = 1e-2, log = true }`` or
``{ choices = [0, 1, 2] }``; a group of settings is a table of them. ``training = "NAME"`` is what ``[training.NAME]``
says. Every key is checked against the plug-in before anything runs.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from pocketrec import registry, settings
from pocketrec.compression.budget import Budget
from pocketrec.errors import ConfigError
from pocketrec.study.recipe import (
    ORIGINAL,
    DataRecipe,
    Recipe,
    _plugin,
    _table,
    read_around,
    read_data,
    read_recipe,
    without_plan_keys,
)

if TYPE_CHECKING:
    pass


PLANS = Path(__file__).parent / "plans"


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole study.

    Attributes:
        name: of the study.
        data: by label.
        backbones: by label.
        methods: by label.
        budgets: as :class:`~pocketrec.compression.budget.Budget` reads them.
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
    data: Mapping[str, DataRecipe]
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

    def pairs_of(self) -> Iterator[tuple[DataRecipe, Recipe]]:
        """Every data set with every backbone of its task."""
        for data in self.data.values():
            task = registry.load("sources", data.source).task
            for backbone in self.backbones.values():
                if registry.load("backbones", backbone.plugin).task == task and backbone.fits(data.label):
                    yield data, backbone.at(data.label)

    def methods_of(self, data: DataRecipe) -> list[str]:
        """Labels of the methods for a data set."""
        return [label for label, method in self.methods.items() if method.fits(data.label)]

    def budgets_of(self, data: DataRecipe, method: str | None = None) -> tuple[str, ...]:
        """Budgets of the cells of a data set, or of one method there."""
        budgets = data.budgets or self.budgets
        own = self.within.get(method, ()) if method is not None else ()
        return tuple(b for b in budgets if not own or b in own)

    def seeds_of(self, data: DataRecipe, budget: str | None = None) -> tuple[int, ...]:
        """Seeds of the cells of a data set, or of one budget there."""
        seeds = data.seeds or self.seeds
        return seeds[:1] if budget in self.brief else seeds

    def trials_of(self, data: DataRecipe) -> int:
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


# ---- reading ---------------------------------------------------------------------------------------------------------


def parse(document: Mapping[str, Any], name: str = "study") -> Plan:
    """A plan from its TOML document, every key of it checked."""
    tables = {"data": "data", "backbone": "backbones", "method": "methods"}
    plain = [f.name for f in dataclasses.fields(Plan) if f.name not in (*tables.values(), "around", "within")]
    settings.known("", document, [*tables, "training", *plain])
    document = _trained(document, document.get("training", {}), "")
    for table in tables:
        if not isinstance(document.get(table), dict) or not document[table]:
            raise ConfigError(f"A plan needs at least one table [{table}.NAME], but has none; add one.")
    document = {**document, **{axis: _alike(axis, document[axis]) for axis in ("backbone", "method")}}
    labels = list(document["data"])
    values = {n: v for n, v in document.items() if n in plain}
    checked = {n: settings.checked(n, v, get_type_hints(Plan)[n]) for n, v in values.items()}
    backbones = {label: read_recipe("backbone", label, e, labels) for label, e in document["backbone"].items()}
    plan = Plan(
        **{"name": name, "budgets": (), **checked},
        data={label: read_data(label, entry) for label, entry in document["data"].items()},
        backbones=backbones,
        methods={
            label: read_recipe("method", label, without_plan_keys(e), labels) for label, e in document["method"].items()
        },
        around={label: read_around(f"method.{label}", label, e, backbones) for label, e in document["method"].items()},
        within={
            label: settings.checked(f"method.{label}.budgets", e["budgets"], tuple[str, ...])
            for label, e in document["method"].items()
            if isinstance(e, dict) and "budgets" in e
        },
    )
    _sound(plan)
    return plan


def _alike(axis: str, tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of an axis; one that is ``like`` another has the keys of that one where it has none of its own.

    Groups of settings are merged, too.
    """
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
            other = {"is": entry["like"], **tables[entry["like"]]}
            plugin = _plugin("backbones" if axis == "backbone" else "methods", own.get("is", other["is"]), label)
            groups = {s.name.partition(".")[0] for s in settings.leaves(plugin) if "." in s.name}
            both = {n: {**other[n], **own[n]} for n in groups & own.keys() & other.keys()}
            found[label] = {**other, **own, **both}
    return found


def _trained(entry: Any, named: Any, where: str) -> Any:
    """A table in which every ``training = "NAME"`` is what ``[training.NAME]`` says."""
    if not isinstance(entry, Mapping):
        return entry
    found = {}
    for key, value in entry.items():
        place = f"{where}.{key}" if where else key
        if key == "training" and isinstance(value, str):
            settings.known(place, [value], list(_table("training", named)), "training of the plan")
            value = named[value]
        elif place != "training":
            value = _trained(value, named, place)
        found[key] = value
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
    settings.known("brief", dict.fromkeys(plan.brief), list(every))
    for label, budgets in plan.within.items():
        settings.known(f"method.{label}.budgets", dict.fromkeys(budgets), list(every))
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
