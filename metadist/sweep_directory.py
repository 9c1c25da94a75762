"""The sweep directory: trials by number, each a run directory, and what came of them."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metadist.config import config_to_dict
from metadist.config_file import dump_yaml
from metadist.errors import RunDirectoryError
from metadist.files import replacing, writing
from metadist.run_directory import RunDirectory
from metadist.sweep import Point, Sweep
from metadist.trial import OUTCOME_FILE, read_failure, read_outcome, read_reports

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
            saved = json.loads(place.read_text())
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
        self._write(number, POINT_FILE, point)

    def end(self, number: int, outcome: str) -> None:
        """Writes down that a trial is `finished`, was `stopped` by the scheduler, or `failed`."""
        self._write(number, OUTCOME_FILE, {"outcome": outcome})

    def _write(self, number: int, name: str, value: Any) -> None:
        directory = RunDirectory(str(self.trial(number)))
        directory.create()
        directory.write_json(name, value)

    def rows(self) -> list[dict[str, Any]]:
        """One row a trial, in order: number, outcome, steps, last validation, error, and the point's values."""
        rows = []
        for number in range(self._sweep.num_trials):
            point = self.point(number)
            if point is None:
                continue
            directory = RunDirectory(str(self.trial(number)))
            last = (read_reports(directory) or [{}])[-1]
            row: dict[str, Any] = {"trial": number, "outcome": read_outcome(directory) or "unfinished"}
            row |= {"step": last.get("step", 0), "loss": last.get("loss"), "accuracy": last.get("accuracy")}
            rows.append(row | {"error": read_failure(directory)} | point)
        return rows

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
            config = config_to_dict(self._sweep.config(self.point(best["trial"]) or {}))
            config["run"] |= {"name": f"{self.path.name}_best"}
            with replacing(self.path / BEST_FILE) as partial:
                partial.write_text(dump_yaml(config))

    def line(self, number: int) -> str:
        """What came of a trial, in a line."""
        row = next(row for row in self.rows() if row["trial"] == number)
        point = ", ".join(f"{key} {_shown(row[key])}" for key in self._sweep.space)
        value = row[self._sweep.objective.metric]
        score = "" if value is None else f"  {self._sweep.objective.metric} {value:.4f}"
        return f"trial {number}  {row['outcome']} at step {row['step']}{score}  {point}"


def trial_name(number: int) -> str:
    return f"{number:05d}"


def read_point(trial: Path) -> Point | None:
    """What a trial was begun with; None where there is none. Lists are tuples, as in a space."""
    place = trial / POINT_FILE
    if not place.exists():
        return None
    return {key: as_tuples(value) for key, value in json.loads(place.read_text()).items()}


def as_tuples(value: Any) -> Any:
    """A value of a space as it was before JSON made lists of its tuples."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, tuple) else value


def _column(values: list[Any]) -> list[Any]:
    """A column has one type: values of several kinds (1 and "auto") become text."""
    kinds = {type(value) for value in values if value is not None}
    return values if len(kinds) <= 1 or kinds == {int, float} else [json.dumps(value) for value in values]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
