"""The end of a sweep: its best settings and the base config, trained anew with several seeds and scored on test tasks.

What was best among many on validation tasks is partly luck. New seeds, the full budget and tasks that nobody has
looked at say what is left of it; and each is held against the base config's own setting, on the same episodes.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from metadist.comparison import compare
from metadist.config import Config
from metadist.files import replacing
from metadist.paired import Comparison
from metadist.scores import HEADERS, Score, add_column, mean_and_interval, written
from metadist.sections import ScalingSettings
from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.sweep import Point, Sweep

FINALS_FILE = "finals.json"
BASE = "base config"


@dataclass(frozen=True)
class Finalist:
    """One setting after its final trainings."""

    name: str
    point: Point
    """Empty for the base config."""
    seeds: list[float]
    """Mean score on the test tasks, seed by seed."""
    score: Score
    """Of the mean over seeds; the interval is over test tasks."""
    difference: Score | None
    """To the base config, paired task by task; None for itself."""


@dataclass(frozen=True)
class Finals:
    """All of a sweep, the base config first."""

    metric: str
    episodes: int
    finalists: list[Finalist]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> Table:
        """One row a finalist."""
        seeds = len(self.finalists[0].seeds)
        title = f"trained anew with {seeds} seeds, {self.episodes} test episodes; mean and 95 % interval over these"
        table = Table(title=title, title_justify="left")
        table.add_column("setting")
        scale, form = (100, ".2f") if self.metric == "accuracy" else (1, ".4f")
        columns = {
            HEADERS[self.metric]: [written(each.score, self.metric) for each in self.finalists],
            "to the base config": [
                written(each.difference, self.metric, "+") if each.difference else "" for each in self.finalists
            ],
            "each seed": [", ".join(f"{scale * value:{form}}" for value in each.seeds) for each in self.finalists],
        }
        for header, cells in columns.items():
            add_column(table, header, cells)
        for each, *cells in zip(self.finalists, *columns.values(), strict=True):
            table.add_row(each.name, *cells)
        return table


def run_finals(sweep: Sweep, directory: SweepDirectory, scaling: ScalingSettings, console: Console) -> Finals | None:
    """Trains what is not trained yet, one after another, evaluates all on the test tasks once, writes finals.json.

    `scaling` says with how many adapters, which changes no bit. None where the sweep asks for no finals, or no trial
    was validated.
    """
    best = directory.ranked()[: sweep.final.candidates]
    if not best:
        return None
    numbers = {f"trial {row['trial']}": row["trial"] for row in best}
    settings: dict[str, Point] = {BASE: {}}
    settings |= {name: directory.settings(number) for name, number in numbers.items()}
    overrides: dict[str, Point] = {BASE: {}}
    overrides |= {name: directory.overrides(number) for name, number in numbers.items()}
    configs = [
        dataclasses.replace(_config(sweep, directory, name, changed, seed), scaling=scaling)
        for name, changed in overrides.items()
        for seed in _seeds(sweep)
    ]
    finals = _summed(sweep, settings, compare(configs, split="test", console=console))
    with replacing(directory.path / FINALS_FILE) as partial:
        partial.write_text(json.dumps(finals.as_dict(), indent=2) + "\n")
    return finals


def _seeds(sweep: Sweep) -> list[int]:
    """Others than the one that all trials had."""
    first = int(sweep.base["training"]["seed"]) + 1
    return list(range(first, first + sweep.final.seeds))


def _config(sweep: Sweep, directory: SweepDirectory, name: str, overrides: Point, seed: int) -> Config:
    config = sweep.config(overrides)
    run = dataclasses.replace(
        config.run, storage_path=str(directory.path / "finals"), name=f"{name.replace(' ', '_')}_seed_{seed}"
    )
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed), run=run)


def _summed(sweep: Sweep, settings: dict[str, Point], comparison: Comparison) -> Finals:
    metric = comparison.score
    scores = np.stack(
        [getattr(run.evaluation.policies[0], f"episode_{metric}")[:, -1] for run in comparison.runs]
    ).astype(np.float64)
    by_setting = scores.reshape(len(settings), sweep.final.seeds, -1)
    base = by_setting[0].mean(0)
    finalists = [
        Finalist(
            name=name,
            point=point,
            seeds=of_seeds.mean(1).tolist(),
            score=mean_and_interval(of_seeds.mean(0)),
            difference=mean_and_interval(of_seeds.mean(0) - base) if point else None,
        )
        for (name, point), of_seeds in zip(settings.items(), by_setting, strict=True)
    ]
    return Finals(metric, scores.shape[1], finalists)
