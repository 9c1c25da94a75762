"""The sweep directory: trials by number, each a run directory, and what came of them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metadist.config import config_to_dict
from metadist.config_file import dump_yaml
from metadist.errors import RunDirectoryError
from metadist.files import parse_json, replacing, writing
from metadist.run_directory import RunDirectory
from metadist.sweeps.lineage import (
    SCHEDULES,
    branch,
    branch_directory,
    changed,
    has_checkpoint,
    rates_at_the_end,
    read_lineage,
    run_directories,
    scheduled,
)
from metadist.sweeps.search_space import as_tuples
from metadist.sweeps.sweep import Point, Sweep
from metadist.sweeps.trial import OUTCOME_FILE, Report, read_error, read_outcome, read_reports

SWEEP_FILE = "sweep.json"
TRIALS = "trials"
POINT_FILE = "point.json"
RESULTS_FILE = "results.parquet"
BEST_FILE = "best.yaml"


class SweepDirectory:
    """Everything of one sweep, under names that never change. It must be seen by every node under its path."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self.path = sweep.directory.absolute()

    def open(self, resume: bool) -> None:
        """Makes the directory, or finds this very sweep in it. Raises RunDirectoryError."""
        place, asked = self.path / SWEEP_FILE, self._sweep.as_dict()
        if not place.exists():
            if resume:
                raise RunDirectoryError(
                    f"{self.path} holds no sweep to go on with. Correct run.name, or leave --resume out."
                )
            with writing(str(self.path)):
                (self.path / TRIALS).mkdir(parents=True, exist_ok=True)
            with replacing(place) as partial:
                partial.write_text(json.dumps(asked, indent=2) + "\n")
            return
        if not resume:
            raise RunDirectoryError(
                f"{self.path} holds a sweep already. Go on with it by --resume, or choose another run.name."
            )
        try:
            saved = parse_json(place.read_text())
            different = [key for key in asked if saved.get(key) != asked[key]]
        except (ValueError, AttributeError):
            raise RunDirectoryError(f"{place}: not valid JSON. Restore it, or choose another run.name.") from None
        if different:
            raise RunDirectoryError(
                f"{self.path} holds another sweep: {', '.join(different)} differ from the file's. Choose another"
                " run.name, or use that sweep's file."
            )

    def new_attempt(self) -> str:
        """A name for Tune's own files of one call; nothing of them is read again."""
        return f"ray/{len(list((self.path / 'ray').glob('*'))):03d}"

    def trial(self, number: int) -> Path:
        """The run directory of a trial."""
        return self.path / TRIALS / trial_name(number)

    def point(self, number: int) -> Point | None:
        """What a trial of this number was begun with; None for a new one. Lists are tuples, as in a space."""
        return read_point(self.trial(number))

    def begin(self, number: int, point: Point) -> None:
        """Writes down a trial's point before anything is computed with it."""
        self._write(self.trial(number), POINT_FILE, point)

    def end(self, number: int, outcome: str, error: str | None = None) -> None:
        """Writes down that a trial is `finished`, was `stopped` by the scheduler, or `failed`, and why."""
        for place in {self.trial(number), self.run(number)}:
            self._write(place, OUTCOME_FILE, {"outcome": outcome, "error": error})

    def _write(self, place: Path, name: str, value: Any) -> None:
        directory = RunDirectory(str(place))
        directory.create()
        directory.write_json(name, value)

    def run(self, number: int, step: int | None = None) -> Path:
        """The run directory in which a trial makes outer step `step`, counted from 1; left out, its last one.

        Only a trial whose rates change in mid-run has more than one.
        """
        runs = run_directories(self.trial(number))
        begun = [run for run in runs if step is None or ((read_lineage(run) or {}).get("step", 0) < step)]
        return begun[-1]

    def overrides(self, number: int, step: int | None = None) -> Point:
        """What a trial's config replaces in the base config, in its run directory at that step."""
        run = self.run(number, step)
        lineage = read_lineage(run)
        if lineage is not None:
            overrides: Point = lineage["overrides"]
        else:
            point = self.point(number) or {}
            overrides = scheduled(point) if self._sweep.scheduler.changes_rates else point
        return overrides | {"run.storage_path": str(run.parent), "run.name": run.name}

    def branch(self, number: int, source: int, step: int, rates: dict[str, float]) -> Point:
        """Has a trial go on after a step from where `source` is, with other rates; gives its overrides.

        Where it has done so before, the sweep being resumed, nothing is changed: what was begun counts. It stays where
        it is if `source` has no checkpoint of that step any more, since it went on before.
        """
        place, origin = branch_directory(self.trial(number), step), self.run(source, step)
        if not place.exists() and has_checkpoint(origin, step):
            overrides = changed(self.overrides(source, step), step, rates)
            overrides |= {"run.storage_path": str(place.parent), "run.name": place.name}
            branch(origin, source, step, place, overrides, self._sweep.config(overrides))
        return self.overrides(number, step + 1)

    def reports(self, number: int) -> list[Report]:
        """The validations of a trial, by step."""
        return read_all_reports(self.trial(number))

    def rows(self) -> list[dict[str, Any]]:
        """One row a trial, in order: number, outcome, steps, last validation, error, and the point's values.

        Where rates change in mid-run these are the last ones, with the schedules beside them.
        """
        return [self.row(number) for number in range(self._sweep.num_trials) if self.point(number) is not None]

    def row(self, number: int) -> dict[str, Any]:
        """The row of a trial that has begun."""
        last = (self.reports(number) or [{}])[-1]
        outcome = read_outcome(RunDirectory(str(self.trial(number))))
        row: dict[str, Any] = {"trial": number, "outcome": outcome or "unfinished"}
        row |= {"step": last.get("step", 0), "loss": last.get("loss"), "accuracy": last.get("accuracy")}
        row |= {"error": read_error(RunDirectory(str(self.run(number))))}
        row |= dict.fromkeys(self._sweep.space) | self.settings(number)
        if self._sweep.scheduler.changes_rates:
            overrides = self.overrides(number)
            row |= {key: json.dumps(overrides[key]) for key in SCHEDULES.values() if key in overrides}
        return row

    def settings(self, number: int) -> Point:
        """A trial's values of the space; of rates that change in mid-run, the last ones."""
        point = self.point(number) or {}
        return point | rates_at_the_end(self.overrides(number)) if self._sweep.scheduler.changes_rates else point

    def ranked(self) -> list[dict[str, Any]]:
        """Rows of trials that were validated and did not fail, the best last validation first."""
        metric, mode = self._sweep.objective.metric, self._sweep.objective.mode
        scored = [row for row in self.rows() if row["outcome"] != "failed" and row[metric] is not None]
        return sorted(scored, key=lambda row: row[metric], reverse=mode == "max")

    def best(self) -> dict[str, Any] | None:
        """The row with the best last validation among trials that did not fail."""
        return next(iter(self.ranked()), None)

    def write_results(self) -> None:
        """results.parquet, and best.yaml where a trial has been validated."""
        columns: dict[str, list[Any]] = {}
        for row in self.rows():
            for key, value in row.items():
                columns.setdefault(key, []).append(_cell(value))
        with replacing(self.path / RESULTS_FILE) as partial:
            pq.write_table(pa.table({key: _column(values) for key, values in columns.items()}), partial)
        best = self.best()
        if best is not None:
            config = config_to_dict(self._sweep.config(self.overrides(best["trial"])))
            config["run"] |= {"storage_path": self._sweep.base["run"]["storage_path"]}
            config["run"] |= {"name": f"{self.path.name}_best"}
            with replacing(self.path / BEST_FILE) as partial:
                partial.write_text(dump_yaml(config))

    def line(self, number: int) -> str:
        """What came of a trial, in a line."""
        row = self.row(number)
        point = ", ".join(f"{key} {_shown(row[key])}" for key in self._sweep.space if row[key] is not None)
        value = row[self._sweep.objective.metric]
        score = "" if value is None else f"  {self._sweep.objective.metric} {value:.4f}"
        error = f"  {row['error']}" if row["error"] else ""
        return f"trial {number}  {row['outcome']} at step {row['step']}{score}  {point}{error}"


def trial_name(number: int) -> str:
    return f"{number:05d}"


def read_point(trial: Path) -> Point | None:
    """What a trial was begun with; None where there is none. Lists are tuples, as in a space."""
    place = trial / POINT_FILE
    if not place.exists():
        return None
    return {key: as_tuples(value) for key, value in parse_json(place.read_text()).items()}


def read_all_reports(trial: Path) -> list[Report]:
    """The validations of a trial, by step, from all of its run directories."""
    return [report for run in run_directories(trial) for report in read_reports(RunDirectory(str(run)))]


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, tuple) else value


def _column(values: list[Any]) -> list[Any]:
    """A column has one type: values of several kinds (1 and "auto") become text."""
    kinds = {type(value) for value in values if value is not None}
    return values if len(kinds) <= 1 or kinds == {int, float} else [json.dumps(value) for value in values]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
