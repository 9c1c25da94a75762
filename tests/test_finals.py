"""The end of a sweep: the best settings trained anew and held against the base config on test tasks."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from metadist import MetaTrainer, evaluate
from metadist.reporting.sweep_page import render_sweep
from metadist.reporting.sweep_record import read_sweep_record
from metadist.run_directory import RunDirectory
from metadist.sections import ScalingSettings
from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.file import load_sweep
from metadist.sweeps.finals import BASE, run_finals
from metadist.sweeps.sweep import FinalSettings, Sweep

CONFIGS = Path(__file__).parents[1] / "configs"
NO_RAY = ScalingSettings(num_workers=0)
LOSSES = {0.001: 3.0, 0.01: 1.0, 0.02: 2.0}
"""Of the trials' last validation, by their inner rate."""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"""\
base: {CONFIGS / "sinusoid_maml.yaml"}
overrides:
  scaling.num_workers: 0
  training.meta_batch_size: 4
  training.chunk_size: 2
  evaluation.val_episodes: 4
  evaluation.episodes: 30
space: {{algorithm.inner_lr: "grid(0.001, 0.01, 0.02)"}}
objective: {{metric: loss}}
budget: {{steps: 4, every: 2}}
scheduler: {{name: none}}
searcher: {{name: grid}}
final: {{candidates: 2, seeds: 2}}
run: {{storage_path: {tmp_path}, name: out}}
"""
    )
    return load_sweep(path)


@pytest.fixture
def directory(sweep: Sweep) -> SweepDirectory:
    """After trials whose validations were as LOSSES says."""
    found = SweepDirectory(sweep)
    found.open(resume=False)
    for number, point in enumerate(sweep.points()):
        found.begin(number, point)
        reports = [{"step": 4, "loss": LOSSES[point["algorithm.inner_lr"]]}]
        RunDirectory(str(found.trial(number))).write_json("reports.json", reports)
        found.end(number, "finished")
    found.write_results()
    return found


def test_the_best_ones_are_trained_with_new_seeds_and_compared_task_by_task(sweep, directory) -> None:
    quiet = Console(quiet=True)
    finals = run_finals(sweep, directory, NO_RAY, quiet)
    assert [each.name for each in finals.finalists] == [BASE, "trial 1", "trial 2"]
    assert [each.point.get("algorithm.inner_lr") for each in finals.finalists] == [None, 0.01, 0.02]
    scores = {}
    for each in finals.finalists:
        runs = []
        for seed in (1, 2):
            # The same training by itself, elsewhere.
            config = sweep.config(each.point)
            config = dataclasses.replace(
                config,
                training=dataclasses.replace(config.training, seed=seed),
                run=dataclasses.replace(
                    config.run, storage_path=str(directory.path / "again"), name=f"{each.name}{seed}"
                ),
            )
            run_dir = MetaTrainer(config, console=quiet).fit(evaluate=False).run_dir
            runs.append(evaluate(run_dir, console=quiet).policies[0].episode_loss[:, -1])
        scores[each.name] = np.mean(np.array(runs, dtype=np.float64), axis=0)
        assert each.seeds == pytest.approx([run.mean() for run in runs])
        assert each.score["mean"] == pytest.approx(scores[each.name].mean())
    for each in finals.finalists[1:]:
        difference = scores[each.name] - scores[BASE]
        assert each.difference["mean"] == pytest.approx(difference.mean(), rel=1e-6)
        assert each.difference["ci95"] == pytest.approx(1.96 * difference.std(ddof=1) / np.sqrt(30), rel=1e-6)
    assert finals.finalists[0].difference is None
    saved = json.loads((directory.path / "finals.json").read_text())
    assert saved == json.loads(json.dumps(finals.as_dict()))
    page = render_sweep(read_sweep_record(str(directory.path)))
    assert "<h2>On test tasks</h2>" in page
    # Called again, nothing is trained a second time.
    before = {path: path.stat().st_mtime_ns for path in (directory.path / "finals").rglob("theta.safetensors")}
    assert run_finals(sweep, directory, NO_RAY, quiet) == finals
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_no_finals_are_made_where_none_are_asked_for(sweep, directory) -> None:
    without = dataclasses.replace(sweep, final=FinalSettings())
    assert run_finals(without, directory, NO_RAY, Console(quiet=True)) is None
    assert not (directory.path / "finals").exists()
