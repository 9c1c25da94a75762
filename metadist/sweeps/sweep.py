"""Sweeps: what is searched over what space on what budget; `file.py` reads them from YAML."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from metadist.config import Config, config_from_document
from metadist.config_file import dump_yaml, parse_document
from metadist.core.settings import settings
from metadist.sections import Count, CountOrZero
from metadist.sweeps.search_space import Distribution

Point = dict[str, Any]
"""A value for every key of the space whose condition holds."""


@settings
class ObjectiveSettings:
    """Section `objective`: what the validation tasks say after adaptation. Test tasks are never looked at."""

    metric: Literal["accuracy", "loss"] = "accuracy"

    @property
    def mode(self) -> Literal["max", "min"]:
        return "max" if self.metric == "accuracy" else "min"


@settings
class BudgetSettings:
    """Section `budget`."""

    trials: Count = 16
    """A grid has as many as it has points, whatever stands here."""
    steps: Count = 1000
    """Outer steps of a trial that is never stopped."""
    every: Count = 100
    """Outer steps between validations, after each of which a trial may be stopped, and between checkpoints."""
    max_concurrent: Count | None = None
    """Trials at once; left out, as many as the cluster has room for. With 1 the whole sweep is reproducible; with
    hyperband, pbt and pb2, whose trials wait for each other, it is so anyway."""
    max_failures: CountOrZero = 2
    """How often a trial whose process died is begun again, from its last checkpoint."""


@settings
class SchedulerSettings:
    """Section `scheduler`: which trials are stopped early, or change in mid-run.

    `asha` (Li et al. 2020, arXiv:1810.05934): after `grace_steps` times each power of `reduction_factor`, a trial
    goes on if it is among the best 1 / reduction_factor of those that came as far. `hyperband` (Li et al. 2018,
    JMLR 18(185)): the same in brackets, whose trials wait for each other; each bracket begins with other steps.
    `median` (Golovin et al. 2017, sec. 3.2.2): if its best so far is not worse than the median of the others' running
    means. `pbt` (Jaderberg et al. 2017, arXiv:1711.09846) and `pb2` (Parker-Holder et al. 2020, arXiv:2002.02518)
    stop none: every `perturb_every` steps the worst `quantile` takes over theta and the optimizer of ones of the best,
    and goes on with other rates.
    """

    name: Literal["asha", "hyperband", "median", "pbt", "pb2", "none"] = "asha"
    grace_steps: Count | None = None
    """Steps that every trial makes; left out, budget.every."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0
    perturb_every: Count | None = None
    """A generation's steps; left out, budget.every."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25

    @property
    def changes_rates(self) -> bool:
        return self.name in ("pbt", "pb2")

    @property
    def begins_all_at_once(self) -> bool:
        """Whether trials wait for each other, so that all must be there from the start."""
        return self.name in ("hyperband", "pbt", "pb2")


@settings
class SearcherSettings:
    """Section `searcher`: which point is tried next. `tpe` and `gp` are Optuna's, `hyperopt` HyperOpt's TPE."""

    name: Literal["random", "grid", "tpe", "gp", "hyperopt"] = "random"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def learns(self) -> bool:
        """Whether the next point depends on what the trials before have told. These need the extra `tune`."""
        return self.name not in ("random", "grid")


@settings
class FinalSettings:
    """Section `final`: the best settings and the base config are trained anew, and scored once on test tasks."""

    candidates: CountOrZero = 0
    """How many of the best settings; 0 for none."""
    seeds: Count = 3
    """Trainings of each, none of them with the seed that the trials had."""


@settings
class PlaceSettings:
    """Section `run`: the sweep directory is `storage_path/name`."""

    name: str | None = None
    """Left out, the sweep file's name."""
    storage_path: str = "runs/sweeps"


@dataclass(frozen=True)
class Sweep:
    """One sweep, checked. `base` is the resolved config of every trial but for the space's keys."""

    base: dict[str, Any]
    space: dict[str, Distribution]
    objective: ObjectiveSettings
    budget: BudgetSettings
    scheduler: SchedulerSettings
    searcher: SearcherSettings
    final: FinalSettings
    run: PlaceSettings
    first_points: tuple[Point, ...] = ()
    """Tried before any other: the best ones of earlier sweeps."""

    @property
    def directory(self) -> Path:
        return Path(self.run.storage_path) / (self.run.name or "sweep")

    @property
    def num_trials(self) -> int:
        return len(_grid(self.space)) if self.searcher.name == "grid" else self.budget.trials

    def points(self) -> list[Point]:
        """Every point of a grid, the last key fastest, or of a random search, in the order of the trials."""
        if self.searcher.name == "grid":
            return _grid(self.space)
        random = np.random.Generator(np.random.Philox(self.searcher.seed))
        drawn = [_drawn(self.space, random) for _ in range(self.num_trials)]
        return [*self.first_points, *drawn][: self.num_trials]

    def config(self, point: Mapping[str, Any]) -> Config:
        """The config at a point. Raises ConfigError where its values do not go together."""
        return config_at(self.base, point)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that say which sweep it is, but for where it lies and how many trials run at once."""
        plain: dict[str, Any] = {"base": self.base}
        plain["space"] = {key: value.as_dict() for key, value in self.space.items()}
        plain["first_points"] = list(self.first_points)
        for name in ("objective", "budget", "scheduler", "searcher"):
            plain[name] = dict(vars(getattr(self, name)))
        for free in ("max_concurrent", "max_failures"):
            del plain["budget"][free]
        result: dict[str, Any] = json.loads(json.dumps(plain))
        return result


def _grid(space: Mapping[str, Distribution]) -> list[Point]:
    points: list[Point] = [{}]
    for key, distribution in space.items():
        points = [
            more
            for point in points
            for more in (
                [point | {key: value} for value in distribution.values] if distribution.applies(point) else [point]
            )
        ]
    return points


def _drawn(space: Mapping[str, Distribution], random: np.random.Generator) -> Point:
    point: Point = {}
    for key, distribution in space.items():
        if distribution.applies(point):
            point[key] = distribution.sample(random)
    return point


def config_at(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    """A resolved config with some keys (`section.key`) replaced. Raises ConfigError."""
    document = parse_document(dump_yaml(dict(base)), "base config")
    for key, value in overrides.items():
        document.override(f"{key}={json.dumps(value)}")
    return config_from_document(document)
