"""What is to be done: choices of hyper-parameters and final cells, what each needs, and the key it is known by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from pocketrec import registry
from pocketrec.files import digest
from pocketrec.study.plan import Plan
from pocketrec.study.recipe import DENSE, ORIGINAL, STAGE, DataRecipe, Recipe, Space, build_method

JobKind = Literal["choice", "cell", "anatomy", "efficiency"]
WORDS = {"choice": "search", "cell": "cell", "anatomy": "anatomy", "efficiency": "efficiency"}


@dataclass(frozen=True)
class Job:
    """One thing to do, by the plan's labels.

    A ``choice`` is a search on the first seed; a ``cell`` reads test once; an ``anatomy`` looks at an original's table;
    ``efficiency`` takes time and memory when all else is done.
    """

    kind: JobKind
    data: str
    backbone: str
    method: str
    budget: str
    seed: int

    def labels(self) -> dict[str, Any]:
        """The labels that every record has."""
        return asdict(self)

    @property
    def group(self) -> tuple[str | int, ...]:
        """Jobs of one group share a preparation, or the quiet: one worker does them one after the other."""
        if self.kind == "efficiency":
            return (self.kind,)
        return self.kind, self.data, self.backbone, self.method, self.seed

    def __str__(self) -> str:
        """For people."""
        return f"{WORDS[self.kind]} {self.data} {self.backbone} {self.method} {self.budget} seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """All jobs of a plan, in an order in which each comes after what it needs."""

    plan: Plan

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """Every job."""
        return tuple(self._jobs())

    def _jobs(self) -> Iterator[Job]:
        for data, backbone in self.plan.pairs_of():
            yield from self._cells(data, backbone.label, ORIGINAL, (DENSE,))
            for method in self.plan.methods_of(data):
                yield from self._cells(data, backbone.label, method, self.plan.budgets_of(data, method))
            if self.plan.anatomy:
                for seed in self.plan.seeds_of(data):
                    yield Job("anatomy", data.label, backbone.label, ORIGINAL, DENSE, seed)
        for data, backbone in self.plan.pairs_of() if self.plan.efficiency else ():
            first, budget = self.plan.seeds_of(data)[0], self.plan.efficiency_budget
            yield Job("efficiency", data.label, backbone.label, ORIGINAL, DENSE, first)
            for method in self.plan.methods_of(data):
                yield Job("efficiency", data.label, backbone.label, method, budget, first)

    def _cells(self, data: DataRecipe, backbone: str, method: str, budgets: tuple[str, ...]) -> Iterator[Job]:
        """The searches of a method, where there is something to search, and its cells."""
        seeds = self.plan.seeds_of(data)
        searches = [Job("choice", data.label, backbone, method, budget, seeds[0]) for budget in budgets]
        yield from (job for job in searches if self.plan.trials_of(data) > 0 and self.space(job))
        for seed in seeds:
            here = [budget for budget in budgets if seed in self.plan.seeds_of(data, budget)]
            yield from (Job("cell", data.label, backbone, method, budget, seed) for budget in here)

    def needs(self, job: Job) -> tuple[Job, ...]:
        """What has to be done before."""
        if job not in self._needs:
            self._needs[job] = self._needed(job)
        return self._needs[job]

    @cached_property
    def _needs(self) -> dict[Job, tuple[Job, ...]]:
        return {}

    def _needed(self, job: Job) -> tuple[Job, ...]:
        if job.kind == "efficiency":
            return tuple(j for j in self.jobs if j.kind != "efficiency")
        seed = self.plan.seeds_of(self.data(job))[0]
        wanted = []
        if job.kind == "anatomy":
            wanted.append(Job("cell", job.data, job.backbone, ORIGINAL, DENSE, job.seed))
        if job.kind == "cell":
            wanted.append(Job("choice", job.data, job.backbone, job.method, job.budget, seed))
        if self.builds_on_original(job):
            wanted.append(Job("choice", job.data, job.backbone, ORIGINAL, DENSE, seed))
            wanted.append(Job("cell", job.data, job.backbone, ORIGINAL, DENSE, job.seed))
        return tuple(w for w in wanted if w in self._known)

    @cached_property
    def _known(self) -> frozenset[Job]:
        return frozenset(self.jobs)

    def trains(self, job: Job) -> bool:
        """Whether the job trains a model of its own."""
        return job.method == ORIGINAL or registry.load("methods", self.plan.methods[job.method].plugin).trains

    def builds_on_original(self, job: Job) -> bool:
        """Whether a method reads the trained original, at some point of its space at least."""
        method = self.method(job)
        points = [] if method is None else list(method.examples())
        return method is not None and any(build_method(method, point).starts_from == "trained" for point in points)

    def data(self, job: Job) -> DataRecipe:
        """The data set of a job."""
        return self.plan.data[job.data]

    def backbone(self, job: Job) -> Recipe:
        """The backbone of a job, with the changes for its data set, then those of a method that trains it."""
        recipe = self.plan.backbones[job.backbone].at(job.data)
        return recipe.changed(self.plan.around.get(job.method, {}).get(job.backbone))

    def method(self, job: Job) -> Recipe | None:
        """The method of a job, with the changes for its data set; ``None`` for the original."""
        return None if job.method == ORIGINAL else self.plan.methods[job.method].at(job.data)

    def training(self, job: Job) -> Recipe:
        """Where the training of a job is said: at a method that says one, else at the backbone."""
        method = self.method(job)
        return method if method is not None and method.training else self.backbone(job)

    def space(self, job: Job) -> dict[str, Space]:
        """What the search of a job is over: the method's settings; where it trains, backbone and training, too."""
        method = self.method(job)
        own = {} if method is None else {f"method.{n}": s for n, s in _plain(method).items()}
        if not self.trains(job):
            return own
        backbone = {f"backbone.{n}": s for n, s in _plain(self.backbone(job)).items()}
        training = {n: s for n, s in self.training(job).space().items() if n.startswith(STAGE)}
        return {**backbone, **own, **training}

    def key(self, job: Job) -> str:
        """Digest of all that the result of a job depends on; a changed plan never meets a stale result."""
        if job not in self._keys:
            self._keys[job] = self._key(job)
        return self._keys[job]

    @cached_property
    def _keys(self) -> dict[Job, str]:
        return {}

    def _key(self, job: Job) -> str:
        data, backbone, method = self.data(job), self.backbone(job), self.method(job)
        plugin = registry.load("backbones", backbone.plugin)
        searched = self.plan.trials_of(data) if self.space(job) else 0
        return digest(
            {
                "job": job.labels(),
                "data": data.identity(),
                "backbone": backbone.key(plugin, plugin.task),
                "method": None if method is None else method.key(registry.load("methods", method.plugin), plugin.task),
                "search": [searched, self.plan.at_once] if searched else None,
                "first": self.plan.seeds_of(data)[0],
                "bake": data.bake,
                "device": self.plan.device,
                **({"profiles": self.plan.efficiency} if job.kind == "efficiency" else {}),
            }
        )


def _plain(recipe: Recipe) -> dict[str, Space]:
    return {n: s for n, s in recipe.space().items() if not n.startswith(STAGE)}
