"""What a sweep directory tells: its trials, their validations, and which hyperparameters mattered."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from metadist.errors import UserError
from metadist.files import parse_json
from metadist.run_directory import RunDirectory
from metadist.sweeps.directory import SWEEP_FILE, TRIALS, read_all_reports, read_point
from metadist.sweeps.finals import FINALS_FILE
from metadist.sweeps.lineage import SCHEDULES, read_lineage, run_directories, scheduled
from metadist.sweeps.search_space import Distribution
from metadist.sweeps.suggestions import as_optuna
from metadist.sweeps.sweep import Point, SchedulerSettings
from metadist.sweeps.trial import Report, read_error, read_outcome

BEYOND = 10
"""Times the median loss."""
FEWEST_FOR_IMPORTANCE = 8
"""Trials: fewer say nothing of what mattered."""


@dataclass(frozen=True)
class Trial:
    """One of a sweep."""

    number: int
    point: Point
    """What it was begun with."""
    schedules: dict[str, list[tuple[int, float]]]
    """By key, its rates from steps on; empty where rates do not change."""
    taken_over: int
    """How often it went on from another trial's theta."""
    outcome: str
    reports: list[Report]
    error: str | None

    @property
    def settings(self) -> Point:
        """The point; of rates that changed in mid-run, the last ones."""
        return self.point | {key: changes[-1][1] for key, changes in self.schedules.items()}

    def last(self, metric: str) -> float | None:
        value: float | None = self.reports[-1].get(metric) if self.reports else None
        return value

    def at(self, step: int, metric: str) -> float | None:
        """The validation after a step."""
        return next((report.get(metric) for report in self.reports if report["step"] == step), None)


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as its directory has it."""

    location: str
    name: str
    base: dict[str, Any]
    space: dict[str, Distribution]
    metric: str
    steps: int
    searcher: str
    scheduler: str
    changes_rates: bool
    """Whether the scheduler lets rates change in mid-run."""
    trials: list[Trial]
    finals: dict[str, Any] | None
    """Of finals.json: what came of the best ones on test tasks."""

    @property
    def sign(self) -> int:
        """1 where more is better."""
        return 1 if self.metric == "accuracy" else -1

    def ranked(self) -> list[Trial]:
        """Trials with a validation that did not fail, the best last validation first."""
        scored = [trial for trial in self.trials if trial.outcome != "failed" and trial.last(self.metric) is not None]
        return sorted(scored, key=lambda trial: -self.sign * (trial.last(self.metric) or 0.0))

    def heat(self) -> dict[int, float]:
        """By trial number from 0, the best, to 1."""
        ranked = self.ranked()
        return {trial.number: place / max(1, len(ranked) - 1) for place, trial in enumerate(ranked)}

    def ceiling(self, values: Sequence[float]) -> float:
        """A loss above it is one of a trial that diverges, and would outweigh all others."""
        return BEYOND * median(values) if self.metric == "loss" else math.inf

    @property
    def first_step(self) -> int | None:
        """The first validation, which every trial came to."""
        steps = [trial.reports[0]["step"] for trial in self.trials if trial.reports]
        return min(steps, default=None)

    def importances(self) -> tuple[str, dict[str, float]] | None:
        """A method's name and each key's share in the variance of the first validation, over the whole space.

        Functional ANOVA over a random forest (Hutter et al. 2014, ICML) where scikit-learn is installed, else PED-ANOVA
        (Watanabe et al. 2023, IJCAI, arXiv:2304.10255), both Optuna's. None without Optuna, and with few trials.
        """
        step = self.first_step
        values = {trial.number: trial.at(step, self.metric) for trial in self.trials} if step is not None else {}
        scored = [trial for trial in self.trials if values.get(trial.number) is not None]
        if not find_spec("optuna") or len(scored) < FEWEST_FOR_IMPORTANCE or len(self.space) < 2:
            return None
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize" if self.sign > 0 else "minimize")
        ceiling = self.ceiling([value for value in values.values() if value is not None])
        distributions = {key: as_optuna(distribution) for key, distribution in self.space.items()}
        for trial in scored:
            # A key that some trials do not have is left out of account.
            params = {key: self.space[key].encoded(value) for key, value in trial.point.items()}
            known = {key: distributions[key] for key in params}
            value = min(values[trial.number] or 0.0, ceiling)
            study.add_trial(optuna.trial.create_trial(params=params, distributions=known, value=value))
        if find_spec("sklearn"):
            fanova = optuna.importance.FanovaImportanceEvaluator(seed=0)
            return "functional ANOVA", optuna.importance.get_param_importances(study, evaluator=fanova)
        ped_anova = optuna.importance.PedAnovaImportanceEvaluator()
        return "PED-ANOVA", optuna.importance.get_param_importances(study, evaluator=ped_anova)


def is_sweep(directory: str) -> bool:
    return (Path(directory) / SWEEP_FILE).is_file()


def read_sweep_record(directory: str) -> SweepRecord:
    """Raises UserError where a sweep's files are damaged."""
    place = Path(directory)
    finals = place / FINALS_FILE
    try:
        saved = parse_json((place / SWEEP_FILE).read_text())
        space = {key: Distribution.from_dict(value) for key, value in saved["space"].items()}
        changes_rates = SchedulerSettings(**saved["scheduler"]).changes_rates
        return SweepRecord(
            location=directory,
            name=place.absolute().name,
            base=saved["base"],
            space=space,
            metric=saved["objective"]["metric"],
            steps=saved["budget"]["steps"],
            searcher=saved["searcher"]["name"],
            scheduler=saved["scheduler"]["name"],
            changes_rates=changes_rates,
            finals=parse_json(finals.read_text()) if finals.exists() else None,
            trials=[_trial(trial, changes_rates) for trial in sorted((place / TRIALS).glob("*")) if read_point(trial)],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{place / SWEEP_FILE}: missing or damaged. Give the directory of a sweep.") from None


def _trial(place: Path, changes_rates: bool) -> Trial:
    point, run = read_point(place) or {}, run_directories(place)[-1]
    schedules: dict[str, list[tuple[int, float]]] = {}
    if changes_rates:
        overrides = (read_lineage(run) or {}).get("overrides") or scheduled(point)
        schedules = {key: overrides[name] for key, name in SCHEDULES.items() if name in overrides}
    return Trial(
        number=int(place.name),
        point=point,
        schedules=schedules,
        taken_over=len(run_directories(place)) - 1,
        outcome=read_outcome(RunDirectory(str(place))) or "unfinished",
        reports=read_all_reports(place),
        error=read_error(RunDirectory(str(run))),
    )
