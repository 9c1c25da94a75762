"""Warm start: what was best in earlier sweeps is tried first.

Sweeps of other tasks share no results that could be averaged, so each gives its points in the order of their scores,
and they take turns: the portfolio by average rank of Brazdil & Soares (2000, ECML, sec. 2), where each sweep has ranked
points of its own.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metadist.errors import UserError, first_line
from metadist.files import parse_json
from metadist.sweeps.directory import RESULTS_FILE, SWEEP_FILE, TRIALS, read_point, trial_name
from metadist.sweeps.lineage import SCHEDULES
from metadist.sweeps.search_space import as_tuples
from metadist.sweeps.sweep import Point, Sweep

POINTS_EACH = 5
"""Of every earlier sweep."""


def with_first_points(sweep: Sweep, directories: list[str], points_each: int = POINTS_EACH) -> Sweep:
    """The sweep, with the best points of ended sweeps to begin with.

    Points that lie outside of the space in a key that both sweeps have are left out; keys that the earlier sweep
    had not are those of the base config. Raises UserError where a directory holds no results, or nothing fits.
    """
    if sweep.searcher.name == "grid":
        raise UserError("--from needs a searcher that chooses (random, tpe, gp, hyperopt), and searcher.name is grid.")
    ranked = [_best(sweep, Path(directory))[:points_each] for directory in directories]
    taken: list[Point] = []
    for turn in itertools.zip_longest(*ranked):
        taken += [point for point in turn if point is not None and point not in taken]
    if directories and not taken:
        raise UserError(
            f"--from: no point of {', '.join(directories)} lies in this sweep's space"
            f" ({', '.join(sweep.space)}). Widen the space, or leave --from out."
        )
    return dataclasses.replace(sweep, first_points=tuple(taken))


def with_saved_first_points(sweep: Sweep) -> Sweep:
    """The sweep with the first points that its directory says, to go on with it."""
    try:
        saved = parse_json((sweep.directory / SWEEP_FILE).read_text())["first_points"]
        points = tuple({key: as_tuples(value) for key, value in point.items()} for point in saved)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return sweep  # What is wrong with the directory is said where it is opened.
    return dataclasses.replace(sweep, first_points=points)


def _best(sweep: Sweep, directory: Path) -> list[Point]:
    """Points of an ended sweep that fit the space, the best first."""
    try:
        mode = parse_json((directory / SWEEP_FILE).read_text())["objective"]["metric"]
        rows = pq.read_table(directory / RESULTS_FILE).to_pylist()
        sign = -1 if mode == "accuracy" else 1
        scored = [row for row in rows if row["outcome"] != "failed" and row[mode] is not None]
        # Trials that were stopped early are behind all that came further.
        scored.sort(key=lambda row: (-row["step"], sign * row[mode]))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(
            f"--from: {directory} holds no ended sweep ({first_line(error)}). Give a directory with {RESULTS_FILE}."
        ) from None
    fitting = (_fitted(sweep, _tried(directory, row)) for row in scored)
    return [point for point in fitting if point is not None]


def _tried(directory: Path, row: dict[str, Any]) -> Point:
    """A trial's point; of rates that changed in mid-run, the last ones."""
    rates = {key: row[key] for key in SCHEDULES if row.get(key) is not None}
    return (read_point(directory / TRIALS / trial_name(row["trial"])) or {}) | rates


def _fitted(sweep: Sweep, tried: Point) -> Point | None:
    point: Point = {}
    for key, distribution in sweep.space.items():
        if not distribution.applies(point):
            continue
        value = tried[key] if key in tried else _in_base(sweep, key)
        if not distribution.holds(value):
            return None
        point[key] = value
    return point


def _in_base(sweep: Sweep, key: str) -> Any:
    value: Any = sweep.base
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
