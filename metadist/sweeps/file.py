"""Sweep files: read from YAML as strictly as a config, with all mistakes at once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metadist.config import checked_section, config_from_document, config_to_dict
from metadist.config_errors import unknown_key
from metadist.config_file import Document, read_document
from metadist.errors import ConfigError, first_line
from metadist.sweeps.lineage import scheduled
from metadist.sweeps.rules import scheduler_problems
from metadist.sweeps.search_space import Distribution, parse_distribution
from metadist.sweeps.sweep import (
    BudgetSettings,
    FinalSettings,
    ObjectiveSettings,
    PlaceSettings,
    Point,
    SchedulerSettings,
    SearcherSettings,
    Sweep,
    config_at,
)

_SECTIONS: dict[str, type] = {
    "objective": ObjectiveSettings,
    "budget": BudgetSettings,
    "scheduler": SchedulerSettings,
    "searcher": SearcherSettings,
    "final": FinalSettings,
    "run": PlaceSettings,
}
_KEYS = ["base", "overrides", "space", *_SECTIONS]


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
    searcher, budget, scheduler = sections["searcher"], sections["budget"], sections["scheduler"]
    if searcher is not None:
        problems.extend(_unfit(document, searcher.name, space))
    unconnected = _unconnected(document, space)
    problems.extend(unconnected)
    if None not in (searcher, budget, scheduler):
        problems.extend(scheduler_problems(document, scheduler, searcher, budget, space))
    base = None if budget is None else _base(document, Path(path), budget, problems)
    if base is not None and not unconnected:
        for key in space:
            as_overrides = scheduled if scheduler is not None and scheduler.changes_rates else dict
            problems.extend(_invalid_values(document, base, key, space, as_overrides))
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


def _unconnected(document: Document, space: dict[str, Distribution]) -> list[str]:
    """A condition names a key before its own, and values that this key may take."""
    problems = []
    before: dict[str, Distribution] = {}
    for key, distribution in space.items():
        condition, place = distribution.condition, document.place(("space", key))
        if condition is not None and condition.key not in before:
            remedy = f"Before it are {', '.join(before)}." if before else "Move it down."
            problems.append(
                f"space.{key} must depend on a key that stands before it in the space, got {condition.key}{place}."
                f" {remedy}"
            )
        elif condition is not None:
            parent = before[condition.key]
            never = [value for value in condition.values if not parent.is_listed or value not in parent.values]
            if never or not condition.values:
                known = ", ".join(map(str, parent.values)) if parent.is_listed else "none that are listed"
                problems.append(
                    f"space.{key} must depend on listed values of {condition.key} ({known}), got"
                    f" {', '.join(map(str, never)) or 'none'}{place}. Correct the condition."
                )
        before[key] = distribution
    return problems


def _invalid_values(
    document: Document,
    base: dict[str, Any],
    key: str,
    space: dict[str, Distribution],
    as_overrides: Callable[[Point], Point],
) -> list[str]:
    for given in _settings_before(space, key):
        for value in space[key].values:
            try:
                config_at(base, as_overrides(given | {key: value}))
            except ConfigError as error:
                return [
                    f"space.{key} must hold values that the base config can take, got {value!r}"
                    f"{document.place(('space', key))}. {first_line(error)}."
                ]
    return []


def _settings_before(space: dict[str, Distribution], key: str) -> list[Point]:
    """Values of other keys under which one is searched; of those that decide, all."""
    condition = space[key].condition
    if condition is None:
        return [{}]
    return [
        given | {condition.key: value} for given in _settings_before(space, condition.key) for value in condition.values
    ]
