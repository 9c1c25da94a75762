"""Does a search find what a whole grid finds, with a fifth of its steps?

    python -m benchmarks.sinusoid_search grid      makes benchmarks/sinusoid_grid.json, 12 x 12 trainings; kept
    python -m benchmarks.sinusoid_search search    ASHA with TPE, and random search on the same budget, 5 seeds each

Space, steps and validation tasks are those of benchmarks/sinusoid_search.yaml. What a search found is the setting with
the lowest loss after all steps, among the trials that `--share` of the grid's steps had room for, one trial at a time.
Either command goes on where it was ended.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.file import load_sweep
from metadist.sweeps.sweep import PlaceSettings, Sweep
from metadist.sweeps.trial import Report, TrialFailedError, run_trial

SWEEP = Path(__file__).with_suffix(".yaml")
GRID = Path(__file__).with_name("sinusoid_grid.json")
STDERR = Console(stderr=True, soft_wrap=True, highlight=False)
POINTS = 12
"""Of each rate, in equal steps of its logarithm from one end of the space to the other."""
WITHIN = 0.05
"""Of the grid's best loss, relatively."""
INNER, OUTER = "algorithm.inner_lr", "outer.lr"


def make_grid(place: Path) -> None:
    """Trains every point, and writes its losses."""
    sweep = load_sweep(SWEEP)
    axes = {key: [float(f"{rate:.4g}") for rate in _rates(sweep, key)] for key in (INNER, OUTER)}
    cells = []
    for row, inner_lr in enumerate(axes[INNER]):
        for column, outer_lr in enumerate(axes[OUTER]):
            point = {INNER: inner_lr, OUTER: outer_lr}
            run = {"run.storage_path": str(place), "run.name": f"{row:02d}_{column:02d}"}
            losses = {report["step"]: report["loss"] for report in _trained(sweep, point | run)}
            cells.append(point | {"losses": [losses.get(step) for step in _steps(sweep)]})
            STDERR.print(f"{row:02d} {column:02d} {cells[-1]['losses'][-1]}")
    table = {"base": sweep.base, "axes": axes, "steps": _steps(sweep), "cells": cells}
    GRID.write_text(_written(table))


def _rates(sweep: Sweep, key: str) -> list[float]:
    low, high = sweep.space[key].values
    return list(np.geomspace(low, high, POINTS))


def _steps(sweep: Sweep) -> list[int]:
    return list(range(sweep.budget.every, sweep.budget.steps + 1, sweep.budget.every))


def _trained(sweep: Sweep, overrides: dict[str, Any]) -> list[Report]:
    """A training's validations; fewer where it diverges."""
    reports: list[Report] = []
    try:
        run_trial(sweep.config(overrides), reports.append)
    except TrialFailedError as error:
        STDERR.print(str(error))
    return reports


def _written(table: dict[str, Any]) -> str:
    """JSON with a line for each cell."""
    cells = ",\n  ".join(json.dumps(cell) for cell in table["cells"])
    rest = json.dumps({key: value for key, value in table.items() if key != "cells"}, indent=1)
    return f'{rest[:-2]},\n "cells": [\n  {cells}\n ]\n}}\n'


def searched(place: Path, seed: int, scheduler: str, searcher: str, trials: int, budget: int) -> dict[str, Any]:
    """What a search found with its first trials, up to `budget` steps of all together."""
    from metadist.tuning import tune

    sweep = load_sweep(SWEEP)
    sweep = dataclasses.replace(
        sweep,
        budget=dataclasses.replace(sweep.budget, trials=trials),
        scheduler=dataclasses.replace(sweep.scheduler, name=scheduler),
        searcher=dataclasses.replace(sweep.searcher, name=searcher, seed=seed),
        run=PlaceSettings(name=f"{searcher}_{seed}", storage_path=str(place)),
    )
    directory = SweepDirectory(sweep)
    if not (directory.path / "report.html").exists():
        tune(sweep, resume=(directory.path / "sweep.json").exists(), console=STDERR)
    rows = directory.rows()
    spent = np.cumsum([row["step"] for row in rows])
    within = [row for row, steps in zip(rows, spent, strict=True) if steps <= budget]
    whole = [row for row in within if row["step"] == sweep.budget.steps and row["outcome"] != "failed"]
    best = min(whole, key=lambda row: row["loss"])
    steps = sum(row["step"] for row in within)
    return {"seed": seed, "trials": len(within), "steps": steps, **{key: best[key] for key in ("loss", INNER, OUTER)}}


def search(place: Path, seeds: list[int], trials: int, names: list[str], share: float) -> dict[str, Any]:
    """ASHA with TPE beside random search, against the grid."""
    grid = json.loads(GRID.read_text())
    last = [cell for cell in grid["cells"] if cell["losses"][-1] is not None]
    best = min(last, key=lambda cell: cell["losses"][-1])
    total = len(grid["cells"]) * grid["steps"][-1]
    budget = int(share * total)
    limit = (1 + WITHIN) * best["losses"][-1]
    searches = {"tpe": ("asha", trials), "random": ("none", budget // grid["steps"][-1])}
    found = {
        name: [searched(place, seed, searches[name][0], name, searches[name][1], budget) for seed in seeds]
        for name in names
    }
    for rows in found.values():
        for row in rows:
            row |= {"share": row["steps"] / total, "over_best": row["loss"] / best["losses"][-1] - 1}
    return {"grid_best": best, "grid_steps": total, "limit": limit, "found": found}


def show(result: dict[str, Any]) -> None:
    best = result["grid_best"]
    title = (
        f"grid's best {best['losses'][-1]:.4f} at inner_lr {best[INNER]:.3g}, lr {best[OUTER]:.3g};"
        f" {result['grid_steps']:,} steps"
    )
    table = Table("search", "seed", "trials", "steps", "loss", "to the best", "inner_lr", "lr", title=title)
    for name, rows in result["found"].items():
        for row in rows:
            cells = [str(row["seed"]), str(row["trials"]), f"{row['share']:.1%}", f"{row['loss']:.4f}"]
            cells += [f"{row['over_best']:+.1%}", f"{row[INNER]:.3g}", f"{row[OUTER]:.3g}"]
            table.add_row(name, *cells)
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for name, rows in result["found"].items():
        good = sum(row["loss"] <= result["limit"] for row in rows)
        console.print(f"{name}: within {WITHIN:.0%} of the grid's best in {good} of {len(rows)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sinusoid_search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["grid", "search"])
    parser.add_argument("--place", type=Path, default=Path("runs/sinusoid_search"), help="where trainings lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--trials", type=int, default=80, help="of ASHA; those beyond the budget are left out")
    parser.add_argument("--share", type=float, default=0.2, help="of the grid's steps that a search may take")
    parser.add_argument("--searcher", nargs="+", choices=["tpe", "random"], default=["tpe", "random"])
    parser.add_argument("--json", type=Path, help="write the result of a search there")
    options = parser.parse_args()
    if options.what == "grid":
        make_grid(options.place / "grid")
        return
    result = search(options.place, options.seeds, options.trials, options.searcher, options.share)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
