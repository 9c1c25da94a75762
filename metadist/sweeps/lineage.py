"""Trials whose rates change in mid-run: where each goes on, and the schedule that made its theta.

A trial of a population begins in its own run directory. Where it takes over another's theta after some step, it goes on
in a new one within it, `from_step_00000300`: a copy of the other's run up to there, whose config holds the schedule of
rates from step 0 on. So every run directory is a record of one lineage, and `train` with its config makes the same
bits again.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from metadist.checkpoint import checkpoint_name
from metadist.config import Config, config_to_dict
from metadist.config_file import dump_yaml

SCHEDULES = {"outer.lr": "outer.lr_schedule", "algorithm.inner_lr": "algorithm.inner_lr_schedule"}
"""What may change in mid-run, and the key that says how."""
LINEAGE_FILE = "lineage.json"
_COPIED = ("fingerprint.json", "metrics.jsonl", "tensorboard")


def scheduled(point: dict[str, Any]) -> dict[str, Any]:
    """A point as overrides of a config in which its rates follow schedules, so far without a change.

    The first entry is the rate itself: the same code then computes a lineage with changes and one without.
    """
    return point | {SCHEDULES[key]: [[0, rate]] for key, rate in point.items() if key in SCHEDULES}


def changed(overrides: dict[str, Any], step: int, rates: dict[str, float]) -> dict[str, Any]:
    """The overrides with other rates from a step on."""
    return overrides | {SCHEDULES[key]: [*overrides[SCHEDULES[key]], [step, rate]] for key, rate in rates.items()}


def rates_at_the_end(overrides: dict[str, Any]) -> dict[str, float]:
    """The rates after all changes."""
    return {key: overrides[schedule][-1][1] for key, schedule in SCHEDULES.items() if schedule in overrides}


def run_directories(trial: Path) -> list[Path]:
    """The run directories of a trial in the order of their steps; the last is the one that it is in now."""
    return [trial, *sorted(place for place in trial.glob("from_step_*") if (place / LINEAGE_FILE).exists())]


def branch_directory(trial: Path, step: int) -> Path:
    """Where a trial goes on that takes over another's theta after a step."""
    return trial / f"from_{checkpoint_name(step)}"


def read_lineage(directory: Path) -> dict[str, Any] | None:
    """`from` (a trial's number), `step` and `overrides` of a run directory that began as a copy; None for others."""
    place = directory / LINEAGE_FILE
    return json.loads(place.read_text()) if place.exists() else None


def has_checkpoint(run: Path, step: int) -> bool:
    """Whether a run directory still holds what it was after a step."""
    return (run / "checkpoints" / checkpoint_name(step) / "manifest.json").exists()


def branch(source: Path, number: int, step: int, place: Path, overrides: dict[str, Any], config: Config) -> None:
    """Makes `place`, whole or not at all: the run in `source`, of trial `number`, as it was after `step` steps.

    Theta and the optimizer come with the checkpoint; `config` is the new run's own.
    """
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint = Path("checkpoints") / checkpoint_name(step)
    shutil.copytree(source / checkpoint, partial / checkpoint)
    for name in _COPIED:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy
        copy(source / name, partial / name)
    (partial / "config.yaml").write_text(dump_yaml(config_to_dict(config)))
    lineage = {"from": number, "step": step, "overrides": overrides}
    (partial / LINEAGE_FILE).write_text(json.dumps(lineage, indent=2) + "\n")
    os.replace(partial, place)
