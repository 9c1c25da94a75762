"""Rates that change in mid-run: what a population's trial did is done again, to the bit, from its config alone."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from metadist import MetaTrainer, load_config
from metadist.algorithms.inner_loop import RATE_FACTOR
from metadist.checkpoint import Checkpoints
from metadist.config import Config
from metadist.config_file import dump_yaml
from metadist.distributed.learner import LearnerState
from metadist.errors import ConfigError
from metadist.experiment import make_experiment
from metadist.reporting.sweep_page import render_sweep
from metadist.reporting.sweep_record import read_sweep_record
from metadist.run_directory import RunDirectory
from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.file import load_sweep
from metadist.sweeps.sweep import Sweep
from metadist.sweeps.trial import run_trial

BASE = Path(__file__).parents[1] / "configs/sinusoid_maml.yaml"
QUIET = Console(quiet=True)
SMALL = {
    "scaling.num_workers": 0,
    "training.meta_batch_size": 4,
    "training.chunk_size": 2,
    "evaluation.val_episodes": 4,
    "evaluation.inner_steps": None,
    "run.log_every": 1,
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "MAML": {"algorithm.inner_steps": 2},
    "FOMAML, AdamW": {"algorithm.order": "first", "outer.optimizer": "adamw", "outer.weight_decay": 0.1},
    "Meta-SGD": {"algorithm.name": "meta_sgd"},
    "MAML++": {"algorithm.name": "maml_plus_plus", "algorithm.inner_steps": 2, "algorithm.multi_step_loss_steps": 5},
    "Reptile": {"algorithm.name": "reptile", "algorithm.inner_steps": 3, "algorithm.inner_batch": 4},
    "iMAML, cosine": {"algorithm.name": "imaml", "outer.schedule": "cosine"},
}


class Paused(Exception):
    """Stands for a scheduler that pauses a trial while it tells."""


def sweep_of(folder: Path, overrides: dict[str, Any]) -> Sweep:
    path = folder / "mine.yaml"
    path.write_text(
        f"""\
base: {BASE}
space:
  algorithm.inner_lr: loguniform(1e-3, 0.1)
  outer.lr: loguniform(1e-4, 0.1)
objective: {{metric: loss}}
budget: {{trials: 2, steps: 9, every: 3}}
scheduler: {{name: pbt, quantile: 0.5}}
run: {{storage_path: {folder}, name: sweep}}
{dump_yaml({"overrides": SMALL | overrides})}"""
    )
    return load_sweep(path)


def go_on(sweep: Sweep, directory: SweepDirectory, number: int, until: int) -> list[int]:
    """A trial goes on as in a sweep, until it has told a step; gives the steps that it told."""
    told: list[int] = []

    def tell(report: dict[str, Any]) -> None:
        told.append(report["step"])
        if report["step"] == until < sweep.budget.steps:
            raise Paused

    with contextlib.suppress(Paused):
        run_trial(sweep.config(directory.overrides(number)), tell)
    return told


def state_at(config: Config, step: int) -> LearnerState:
    experiment, directory = make_experiment(config), RunDirectory(config.run_directory)
    return Checkpoints(directory, experiment.theta, experiment.network.statistics_layout).load(step)


def population(folder: Path, overrides: dict[str, Any]) -> tuple[Sweep, SweepDirectory]:
    """Two trials; 1 takes over from 0 after step 3, and 0 from 1 after step 6."""
    sweep = sweep_of(folder, overrides)
    directory = SweepDirectory(sweep)
    directory.open(resume=False)
    for number, point in enumerate(sweep.points()):
        directory.begin(number, point)
        assert go_on(sweep, directory, number, until=3) == [3]
    directory.branch(1, 0, 3, {"algorithm.inner_lr": 0.02, "outer.lr": 0.003})
    assert go_on(sweep, directory, 0, until=6) == [3, 6]
    assert go_on(sweep, directory, 1, until=6) == [6]
    directory.branch(0, 1, 6, {"algorithm.inner_lr": 0.05, "outer.lr": 0.01})
    for number in (0, 1):
        go_on(sweep, directory, number, until=9)
        directory.end(number, "finished")
    return sweep, directory


@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_from_the_config_of_a_lineage_gives_its_bits(tmp_path: Path, name: str) -> None:
    sweep, directory = population(tmp_path, ALGORITHMS[name])
    lineage = sweep.config(directory.overrides(0))
    first = sweep.points()[0]
    assert lineage.outer.lr_schedule == ((0, first["outer.lr"]), (3, 0.003), (6, 0.01))
    assert lineage.algorithm.inner_lr_schedule == ((0, first["algorithm.inner_lr"]), (3, 0.02), (6, 0.05))
    again = dataclasses.replace(lineage, run=dataclasses.replace(lineage.run, name="again"))
    MetaTrainer(again, console=QUIET).fit(evaluate=False)
    found, expected = state_at(again, 9), state_at(lineage, 9)
    assert found.theta.tobytes() == expected.theta.tobytes()
    assert {k: v.tobytes() for k, v in found.optimizer.items()} == {
        k: v.tobytes() for k, v in expected.optimizer.items()
    }
    metrics = [Path(config.run_directory) / "metrics.jsonl" for config in (again, lineage)]
    assert metrics[0].read_text() == metrics[1].read_text()
    # It is another lineage than that of trial 1, which has the same theta up to step 6.
    assert state_at(sweep.config(directory.overrides(1)), 9).theta.tobytes() != expected.theta.tobytes()


def test_the_rates_of_every_step_are_those_of_the_schedule(tmp_path: Path) -> None:
    sweep, directory = population(tmp_path, ALGORITHMS["MAML"])
    config = sweep.config(directory.overrides(0))
    lines = [json.loads(line) for line in (Path(config.run_directory) / "metrics.jsonl").read_text().splitlines()]
    first = sweep.points()[0]
    rates = [line["outer_lr"] for line in lines if "outer_lr" in line]
    assert rates == [first["outer.lr"]] * 3 + [0.003] * 3 + [0.01] * 3
    # A checkpoint holds the inner rate of its last step, over that of the first.
    experiment = make_experiment(config)
    factor = experiment.theta.unflatten(torch.tensor(state_at(config, 9).theta))[RATE_FACTOR]
    assert float(factor) == np.float32(0.05 / first["algorithm.inner_lr"])


def test_a_schedule_of_inner_rates_is_the_inner_rate_of_each_step(tmp_path: Path) -> None:
    """Three steps at one rate and three at another: as a run with the first and its theta in a run with the second."""

    def run(name: str, *overrides: str) -> Config:
        given = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
        config = load_config(BASE, [*given, "outer.optimizer=sgd", f"run.storage_path={tmp_path}", *overrides])
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))
        MetaTrainer(config, console=QUIET).fit(evaluate=False)
        return config

    changes = "algorithm.inner_lr_schedule=[[3, 0.08]]"
    whole = state_at(run("whole", "training.steps=6", changes), 6)
    first = run("first", "training.steps=3")
    resumed = dataclasses.replace(
        first,
        algorithm=dataclasses.replace(first.algorithm, inner_lr=0.08),
        training=dataclasses.replace(first.training, steps=6),
    )
    config_file = Path(first.run_directory) / "config.yaml"
    config_file.write_text(config_file.read_text().replace("inner_lr: 0.01", "inner_lr: 0.08"))
    # Another config is no other numbers, though its fingerprint says so.
    MetaTrainer(resumed, allow_numeric_drift=True, console=QUIET).fit(evaluate=False)
    second = state_at(resumed, 6)
    constant = state_at(run("constant", "training.steps=6"), 6)
    # The factor stands last among theta's parameters, and 0.01 times 8 is not 0.08 to the last bit.
    np.testing.assert_allclose(whole.theta[:-1], second.theta, rtol=1e-6, atol=1e-8)
    assert np.abs(constant.theta - second.theta).max() > 1e-5


def test_a_run_with_another_ones_schedule_has_its_bits(tmp_path: Path) -> None:
    sweep, directory = population(tmp_path, ALGORITHMS["MAML"])
    directory.write_results()
    best = directory.best()
    given = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    given += ["algorithm.inner_steps=2", "training.steps=9", "evaluation.every=3", f"run.storage_path={tmp_path}"]
    for number, source in enumerate((directory.path, directory.run(best["trial"]))):
        config = load_config(BASE, [*given, f"outer.lr_schedule=from {source}", f"run.name=replayed_{number}"])
        assert config.outer == sweep.config(directory.overrides(best["trial"])).outer
        MetaTrainer(config, console=QUIET).fit(evaluate=False)
        expected = state_at(sweep.config(directory.overrides(best["trial"])), 9)
        assert state_at(config, 9).theta.tobytes() == expected.theta.tobytes()
        # What the run holds depends on no other directory.
        saved = load_config(Path(config.run_directory) / "config.yaml")
        assert saved.outer.lr_schedule == config.outer.lr_schedule


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("from nowhere", "outer.lr_schedule: nowhere is neither a run directory nor that of an ended sweep"),
        ("form x", "outer.lr_schedule must be `from RUN` or a list of [step, rate], got 'form x'"),
        ("[[3, 0.1], [3, 0.2]]", "outer.lr_schedule must have rising steps, got [3, 3]"),
        ("[[3, 0]]", "outer.lr_schedule.0.1 must be > 0, got 0"),
        ("from CONSTANT", "has no rates that change"),
    ],
)
def test_a_wrong_schedule_is_told(tmp_path: Path, value: str, said: str) -> None:
    (tmp_path / "config.yaml").write_text(BASE.read_text())
    with pytest.raises(ConfigError) as error:
        load_config(BASE, [f"outer.lr_schedule={value.replace('CONSTANT', str(tmp_path))}"])
    assert said in str(error.value)


def test_a_decision_that_is_made_again_changes_nothing(tmp_path: Path) -> None:
    sweep, directory = population(tmp_path, {})
    directory.branch(1, 0, 6, {"algorithm.inner_lr": 0.07, "outer.lr": 0.002})
    go_on(sweep, directory, 1, until=9)
    runs = [directory.run(1, step=6), directory.run(1, step=7)]
    assert [run.name for run in runs] == ["from_step_00000003", "from_step_00000006"]
    before = [path.read_bytes() for run in runs for path in sorted(run.glob("checkpoints/*/*"))]
    # A sweep that is resumed goes through all of them, and comes to each run directory in turn.
    for step, run in zip((3, 6), runs, strict=True):
        again = directory.branch(1, 0, step, {"algorithm.inner_lr": 0.09, "outer.lr": 0.09})
        assert again["run.name"] == run.name
        assert again["outer.lr_schedule"][-1][1] == {3: 0.003, 6: 0.002}[step]
    assert before == [path.read_bytes() for run in runs for path in sorted(run.glob("checkpoints/*/*"))]


def test_a_trial_stays_where_it_is_if_the_other_ones_checkpoint_is_gone(tmp_path: Path) -> None:
    _, directory = population(tmp_path, {})
    (directory.run(1, step=3) / "checkpoints/step_00000003/manifest.json").unlink()
    assert directory.branch(0, 1, 3, {"algorithm.inner_lr": 0.09, "outer.lr": 0.09})["run.name"] == "00000"


def test_the_report_draws_the_rates_of_each_lineage(tmp_path: Path) -> None:
    sweep, directory = population(tmp_path, {})
    record = read_sweep_record(str(directory.path))
    first = sweep.points()[0]
    assert record.trials[0].schedules["outer.lr"] == [[0, first["outer.lr"]], [3, 0.003], [6, 0.01]]
    assert record.trials[0].settings == {"algorithm.inner_lr": 0.05, "outer.lr": 0.01}
    assert [report["step"] for report in record.trials[0].reports] == [3, 6, 9]
    page = render_sweep(record)
    assert "algorithm.inner_lr against steps" in page
    assert "outer.lr against steps" in page
    assert "<b>2</b><span>times a trial went on from another&#x27;s theta</span>" in page
