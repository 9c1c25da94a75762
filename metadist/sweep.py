"""Sweeps: what is searched over what space on what budget, read from YAML as strictly as a config."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from metadist.config import Config, checked_section, config_from_document, config_to_dict
from metadist.config_errors import unknown_key
from metadist.config_file import Document, dump_yaml, parse_document, read_document
from metadist.core.settings import settings
from metadist.errors import ConfigError, first_line
from metadist.search_space import Distribution, parse_distribution
from metadist.sections import Count, CountOrZero

Point = dict[str, Any]
"""A value for every key of the space."""


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
    """Trials at once; left out, as many as the cluster has room for. With 1 the whole sweep is reproducible."""
    max_failures: CountOrZero = 2
    """How often a trial whose process died is begun again, from its last checkpoint."""


@settings
class SchedulerSettings:
    """Section `scheduler`: which trials are stopped early.

    `asha` (Li et al. 2020, arXiv:1810.05934): after `grace_steps` times each power of `reduction_factor`, a trial
    goes on if it is among the best 1 / reduction_factor of those that came as far. `median` (Golovin et al.
    2017, sec. 3.2.2): if its best so far is not worse than the median of the others' running means.
    """

    name: Literal["asha", "median", "none"] = "asha"
    grace_steps: Count | None = None
    """Steps that every trial makes; left out, budget.every."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3.0


@settings
class SearcherSettings:
    """Section `searcher`: which point is tried next. `tpe` and `gp` are Optuna's (extra `tune`; `gp` needs SciPy)."""

    name: Literal["random", "grid", "tpe", "gp"] = "random"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


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


_SECTIONS: dict[str, type] = {
    "objective": ObjectiveSettings,
    "budget": BudgetSettings,
    "scheduler": SchedulerSettings,
    "searcher": SearcherSettings,
    "final": FinalSettings,
    "run": PlaceSettings,
}
_KEYS = ["base", "overrides", "space", *_SECTIONS]


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
        if self.searcher.name == "grid":
            return math.prod(len(distribution.values) for distribution in self.space.values())
        return self.budget.trials

    def points(self) -> list[Point]:
        """Every point of a grid, the last key fastest, or of a random search, in the order of the trials."""
        if self.searcher.name == "grid":
            values = [distribution.values for distribution in self.space.values()]
            return [dict(zip(self.space, point, strict=True)) for point in itertools.product(*values)]
        random = np.random.Generator(np.random.Philox(self.searcher.seed))
        drawn = [
            {key: distribution.sample(random) for key, distribution in self.space.items()}
            for _ in range(self.num_trials)
        ]
        return [*self.first_points, *drawn][: self.num_trials]

    def config(self, point: Mapping[str, Any]) -> Config:
        """The config at a point. Raises ConfigError where its values do not go together."""
        return config_at(self.base, point)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that say which sweep it is, but for where it lies and how many trials run at once."""
        plain: dict[str, Any] = {"base": self.base}
        plain["space"] = {key: [value.kind, *value.values] for key, value in self.space.items()}
        plain["first_points"] = list(self.first_points)
        for name in ("objective", "budget", "scheduler", "searcher"):
            plain[name] = dict(vars(getattr(self, name)))
        for free in ("max_concurrent", "max_failures"):
            del plain["budget"][free]
        result: dict[str, Any] = json.loads(json.dumps(plain))
        return result


def config_at(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
    """A resolved config with some keys (`section.key`) replaced. Raises ConfigError."""
    document = parse_document(dump_yaml(dict(base)), "base config")
    for key, value in overrides.items():
        document.override(f"{key}={json.dumps(value)}")
    return config_from_document(document)


def load_sweep(path: str | Path) -> Sweep:
    """Reads a sweep file; `base` is relative to it. Raises ConfigError, with all mistakes at once.

    Every value of a list and both ends of an interval must be valid for their key in the base config.
    """
    document = read_document(str(path))
    problems = [unknown_key(document, (key,), _KEYS) for key in document.data if key not in _KEYS]
    sections: dict[str, Any] = {}
    for name, kind in _SECTIONS.items():
        data = document.data.get(name)
        sections[name] = checked_section(document, name, kind, {} if data is None else data, problems)
    space = _space(document, problems)
    searcher, budget = sections["searcher"], sections["budget"]
    if searcher is not None:
        problems.extend(_unfit(document, searcher.name, space))
    base = None if budget is None else _base(document, Path(path), budget, problems)
    if base is not None:
        for key, distribution in space.items():
            problems.extend(_invalid_values(document, base, key, distribution))
    if budget is not None and budget.steps % budget.every:
        problems.append(
            f"budget.steps must be a multiple of budget.every = {budget.every}, got {budget.steps}"
            f"{document.place(('budget', 'steps'))}. Change one of them."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    assert base is not None
    run = sections["run"]
    sections["run"] = PlaceSettings(name=run.name or Path(path).stem, storage_path=run.storage_path)
    return Sweep(base=base, space=space, **sections)


def _space(document: Document, problems: list[str]) -> dict[str, Distribution]:
    data = document.data.get("space")
    if not isinstance(data, dict) or not data:
        problems.append(
            f"space must be a section of one or more config keys, got {data!r}{document.place(('space',))}."
            ' Write for example `space: {algorithm.inner_lr: "loguniform(1e-3, 1)"}`.'
        )
        return {}
    space = {}
    for key, text in data.items():
        try:
            space[key] = parse_distribution(text)
        except ConfigError as error:
            rule, _, remedy = str(error).partition(". ")
            problems.append(
                f"space.{key} {rule}, got {text!r}{document.place(('space', key))}. {remedy.rstrip('.?')}"
                + ("?" if remedy.endswith("?") else ".")
            )
    return space


def _unfit(document: Document, searcher: str, space: dict[str, Distribution]) -> list[str]:
    """A grid needs lists; `grid(..)` needs the searcher of that name."""
    problems = []
    for key, distribution in space.items():
        place = document.place(("space", key))
        if searcher == "grid" and not distribution.is_listed:
            problems.append(
                f"space.{key} must list its values for searcher.name: grid, got {distribution.kind}{place}."
                " Use grid(..), or another searcher."
            )
        if searcher != "grid" and distribution.kind == "grid":
            problems.append(
                f"space.{key} must not be grid(..) with searcher.name: {searcher}{place}. Use choice(..), or"
                " searcher.name: grid."
            )
    return problems


def _base(document: Document, path: Path, budget: BudgetSettings, problems: list[str]) -> dict[str, Any] | None:
    base, overrides = document.data.get("base"), document.data.get("overrides")
    if not isinstance(base, str):
        problems.append(f"base must be the path of a config file, got {base!r}{document.place(('base',))}. Add it.")
        return None
    if overrides is not None and not isinstance(overrides, dict):
        problems.append(
            f"overrides must be a section of config keys, got {overrides!r}{document.place(('overrides',))}."
            " Indent its keys."
        )
        return None
    budgeted = {
        "training.steps": budget.steps,
        "evaluation.every": budget.every,
        "run.checkpoint_config.checkpoint_frequency": budget.every,
    }
    for key in set(overrides or {}) & set(budgeted):
        problems.append(
            f"overrides.{key} follows from the section budget{document.place(('overrides', key))}. Leave it out."
        )
    try:
        config_document = read_document(str(path.parent / base))
        for key, value in ((overrides or {}) | budgeted).items():
            config_document.override(f"{key}={json.dumps(value)}")
        return config_to_dict(config_from_document(config_document))
    except ConfigError as error:
        problems.append(f"base and overrides must make a valid config{document.place(('base',))}. {error}")
        return None


def _invalid_values(document: Document, base: dict[str, Any], key: str, distribution: Distribution) -> list[str]:
    for value in distribution.values:
        try:
            config_at(base, {key: value})
        except ConfigError as error:
            return [
                f"space.{key} must hold values that the base config can take, got {value!r}"
                f"{document.place(('space', key))}. {first_line(error)}."
            ]
    return []
