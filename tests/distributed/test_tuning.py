"""Sweeps on Ray Tune: trials side by side in their own placement groups, and sweeps that are killed and go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray.tune.experiment import Trial
from rich.console import Console

from metadist import MetaTrainer
from metadist.config import Config, load_config
from metadist.distributed.placement import Node, adapter_options
from metadist.errors import ClusterError, ConfigError
from metadist.sections import ScalingSettings
from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.file import load_sweep
from metadist.sweeps.finals import run_finals
from metadist.sweeps.lineage import read_lineage
from metadist.sweeps.trial import run_trial
from metadist.tuning import _MedianStopping, train_finals, trainable, trial_resources, trials_at_once, tune
from tests.distributed import faulty

CONFIGS = Path(__file__).parents[2] / "configs"
WAIT_S = 300


def write_sweep(folder: Path, *, workers: int, trials: int, scheduler: str, searcher: str, at_once: int | None) -> Path:
    path = folder / "mine.yaml"
    path.write_text(
        f"""\
base: {CONFIGS / "sinusoid_maml.yaml"}
overrides:
  scaling.num_workers: {workers}
  training.meta_batch_size: 4
  training.chunk_size: 2
  evaluation.val_episodes: 4
  evaluation.episodes: 20
space:
  algorithm.inner_lr: loguniform(1e-3, 0.1)
objective: {{metric: loss}}
budget: {{trials: {trials}, steps: 9, every: 1, max_concurrent: {json.dumps(at_once)}}}
scheduler: {scheduler}
searcher: {{name: {searcher}}}
run: {{storage_path: {folder}, name: sweep}}
"""
    )
    return path


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("scaling", "cpus", "room"),
    [
        (ScalingSettings(num_workers=1), [2], 2),
        (ScalingSettings(num_workers=0), [2], 2),
        (ScalingSettings(num_workers=(2, 8)), [5], 2),
        (ScalingSettings(num_workers=2, resources_per_worker={"CPU": 0.5}), [3], 3),
        # An adapter has no parts on two nodes, the adapters of a trial may be on two.
        (ScalingSettings(num_workers=1, resources_per_worker={"CPU": 2}), [3, 3], 2),
        (ScalingSettings(num_workers=2), [3, 3], 3),
        (ScalingSettings(num_workers=1), [64], 9),
    ],
)
def test_as_many_trials_at_once_as_the_cluster_has_room_for(
    scaling: ScalingSettings, cpus: list[int], room: int
) -> None:
    assert trials_at_once(scaling, 9, [Node({"CPU": each}) for each in cpus], never) == room


@pytest.mark.parametrize(
    ("scaling", "cpus", "said"),
    [
        (
            ScalingSettings(num_workers=3),
            [2],
            "3 adapters of CPU 1 each, and the whole cluster has CPU 2 on 1 node",
        ),
        (
            ScalingSettings(num_workers=1, resources_per_worker={"CPU": 3}),
            [2, 2],
            "1 adapters of CPU 3 each, and the whole cluster has CPU 4 on 2 nodes: room for 0. Lower",
        ),
        (ScalingSettings(num_workers=0, threads_per_worker=4), [2], "needs CPU 4 (scaling.threads_per_worker), and"),
    ],
)
def test_a_trial_larger_than_the_cluster_is_refused_with_the_arithmetic(
    scaling: ScalingSettings, cpus: list[int], said: str
) -> None:
    nodes = [Node({"CPU": each}) for each in cpus]
    with pytest.raises(ClusterError) as error:
        trials_at_once(scaling, 9, nodes, never)
    assert said in str(error.value)
    # Where an autoscaler is, nodes come when trials ask for them.
    assert trials_at_once(scaling, 9, nodes, lambda: True) == 9


def test_a_median_counts_once_what_a_paused_trial_tells_again() -> None:
    class Controller:
        def get_live_trials(self) -> list[Any]:
            return []

    rule = _MedianStopping(time_attr="step", grace_period=1)
    rule.set_search_properties("loss", "min")
    trial = Trial("trainable", stub=True)
    for step in (1, 2, 1, 2, 3):
        assert rule.on_trial_result(Controller(), trial, {"step": step, "loss": 1.0}) == "CONTINUE"
    assert [result["step"] for result in rule._results[trial]] == [1, 2, 3]


@pytest.mark.parametrize("strategy", ["PACK", "SPREAD"])
def test_adapters_stay_in_the_placement_group_that_they_are_started_in(
    monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    trials: list[Config] = []
    monkeypatch.setattr("metadist.tuning.run_trial", lambda settings, tell: trials.append(settings))
    base = str(CONFIGS / "sinusoid_maml.yaml")
    trainable({"base": base, "run.name": "a_trial", "scaling.placement_strategy": strategy})
    # Ray reads "DEFAULT" and "SPREAD" as a wish to leave it: two trials would then wait for each other's CPUs.
    assert adapter_options(trials[0].scaling)["scheduling_strategy"] is None
    assert trial_resources(load_config(base, [f"scaling.placement_strategy={strategy}"]).scaling).strategy == strategy


@pytest.mark.parametrize(
    "override", ["scaling.backend: train", "scaling.label_selector: {zone: a}", "scaling.learner_gpus: 0.5"]
)
def test_what_would_leave_a_trials_placement_group_is_refused(tmp_path: Path, override: str) -> None:
    path = write_sweep(tmp_path, workers=1, trials=1, scheduler="{name: none}", searcher="random", at_once=1)
    path.write_text(path.read_text().replace("overrides:", f"overrides:\n  {override}"))
    with pytest.raises(ConfigError, match=rf"^{override.partition(':')[0]} .* under overrides"):
        tune(path, console=Console(quiet=True))


@pytest.fixture
def two_cpus(ray_home: dict[str, str]) -> Iterator[None]:
    import ray

    ray.shutdown()
    # "local": left out, Ray would join whatever cluster was last started on this machine.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("two_cpus")
def test_two_trials_with_an_adapter_each_share_two_cpus_and_the_best_config_trains_to_the_same_bits(
    tmp_path: Path,
) -> None:
    path = write_sweep(tmp_path, workers=1, trials=2, scheduler="{name: none}", searcher="random", at_once=2)
    results = tune(path)
    assert results.num_terminated == 2
    table = pq.read_table(tmp_path / "sweep/results.parquet").to_pylist()
    assert [(row["outcome"], row["step"]) for row in table] == [("finished", 9)] * 2
    config = load_config(tmp_path / "sweep/best.yaml", ["scaling.num_workers=0", f"run.storage_path={tmp_path}"])
    told: list[dict[str, Any]] = []
    run_trial(config, told.append)
    assert told[-1]["loss"] == min(row["loss"] for row in table)


@pytest.mark.ray
@pytest.mark.usefixtures("two_cpus")
@pytest.mark.long
def test_finals_share_the_adapters_of_all_trials_at_once_and_come_to_what_one_process_comes_to(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, workers=1, trials=2, scheduler="{name: none}", searcher="random", at_once=2)
    path.write_text(path.read_text() + "final: {candidates: 1, seeds: 1}\n")
    quiet = Console(quiet=True)
    sweep = load_sweep(path)
    tune(sweep, console=quiet)
    finals = train_finals(sweep, console=quiet)
    place = tmp_path / "sweep/finals"
    assert {load_config(run / "config.yaml").scaling.num_workers for run in place.iterdir()} == {(1, 2)}
    shutil.rmtree(place)
    assert finals == run_finals(sweep, SweepDirectory(sweep), ScalingSettings(num_workers=0), quiet)


@pytest.mark.ray
@pytest.mark.usefixtures("two_cpus")
@pytest.mark.parametrize("scheduler", ["pbt", "pb2"])
@pytest.mark.long
def test_a_population_takes_over_what_is_better_and_a_lineage_is_trained_again_to_the_same_bits(
    tmp_path: Path, scheduler: str
) -> None:
    settings = f"{{name: {scheduler}, perturb_every: 3, quantile: 0.3}}"
    path = write_sweep(tmp_path, workers=0, trials=3, scheduler=settings, searcher="random", at_once=None)
    assert tune(path).num_terminated == 3
    table = pq.read_table(tmp_path / "sweep/results.parquet").to_pylist()
    assert [(row["outcome"], row["step"]) for row in table] == [("finished", 9)] * 3
    reports = {run: json.loads((run / "reports.json").read_text()) for run in (tmp_path / "sweep").rglob("trials/*")}
    # After step 3 the worst of three goes on from the best.
    losses = {run.name: told[2]["loss"] for run, told in reports.items()}
    (branch,) = (tmp_path / "sweep").glob("trials/*/from_step_00000003")
    assert branch.parent.name == max(losses, key=losses.__getitem__)
    lineage = read_lineage(branch)
    assert f"{lineage['from']:05d}" == min(losses, key=losses.__getitem__)
    assert_a_lineage_is_trained_again(tmp_path / "sweep", tmp_path / "again")


def assert_a_lineage_is_trained_again(sweep: Path, run_dir: Path) -> None:
    """`train` with the config of a trial that took over another's theta gives its bits."""
    lineage = max((sweep / "trials").glob("*/from_*"), key=lambda place: place.name)
    config = load_config(lineage / "config.yaml", [f"run.storage_path={run_dir.parent}", f"run.name={run_dir.name}"])
    assert len(config.algorithm.inner_lr_schedule) > 1
    MetaTrainer(config, console=Console(quiet=True)).fit(evaluate=False)
    for name in ("theta", "optimizer"):
        file = f"checkpoints/step_00000009/{name}.safetensors"
        assert (run_dir / file).read_bytes() == (lineage / file).read_bytes()


@pytest.mark.ray
@pytest.mark.usefixtures("two_cpus")
@pytest.mark.long
def test_hyperband_halves_its_brackets(tmp_path: Path) -> None:
    # Nine rounds by a factor of three: brackets of 3 trials for 9 rounds, 5 for 3 and 9 for 1; the first two are here.
    path = write_sweep(tmp_path, workers=0, trials=8, scheduler="{name: hyperband}", searcher="random", at_once=None)
    tune(path)
    table = pq.read_table(tmp_path / "sweep/results.parquet").to_pylist()
    assert [row["step"] for row in table[:3]] == [9] * 3
    steps = {row["trial"]: row["step"] for row in table[3:]}
    assert sorted(steps.values()) == [3, 3, 3, 9, 9]
    after_three = {
        number: json.loads((tmp_path / f"sweep/trials/{number:05d}/reports.json").read_text())[2]["loss"]
        for number in steps
    }
    best = sorted(after_three, key=after_three.__getitem__)[:2]
    assert sorted(best) == sorted(number for number, step in steps.items() if step == 9)


@pytest.mark.ray
@pytest.mark.usefixtures("two_cpus")
@pytest.mark.long
def test_a_trial_that_diverges_is_marked_at_once_and_the_sweep_goes_on(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, workers=0, trials=2, scheduler="{name: none}", searcher="grid", at_once=None)
    text = path.read_text().replace("  algorithm.inner_lr: loguniform(1e-3, 0.1)", "  outer.lr: grid(1.0e+30, 0.01)")
    path.write_text(text.replace("overrides:", "overrides:\n  outer.optimizer: sgd"))
    results = tune(path)
    # No process has failed, so none was begun again.
    assert (results.num_terminated, results.num_errors) == (2, 0)
    table = pq.read_table(tmp_path / "sweep/results.parquet").to_pylist()
    assert [row["outcome"] for row in table] == ["failed", "finished"]
    assert table[0]["error"].startswith("NonFiniteError: ")
    assert load_config(tmp_path / "sweep/best.yaml").outer.lr == 0.01


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current directory declares a task `kills_its_trial`, also to trials if Ray starts in it."""
    shutil.copy(faulty.__file__, tmp_path / "tasks_of_a_test.py")
    (tmp_path / "pyproject.toml").write_text(
        '[project.entry-points."metadist.tasks"]\nkills_its_trial = "tasks_of_a_test:KillsItsTrial"\n'
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "tasks_of_a_test", raising=False)
    monkeypatch.chdir(tmp_path)


def write_deadly_sweep(folder: Path, *, times: int, searcher: str) -> Path:
    """Trials one after another, with checkpoints after 3, 6 and 9 steps, each of which may be begun again once.

    Whoever is in step 7, counted from 0, is killed, so many times. The steps that somebody was in are in `steps.log`.
    """
    path = write_sweep(folder, workers=0, trials=2, scheduler="{name: none}", searcher=searcher, at_once=1)
    task = {"name": "kills_its_trial", "dies_at": 7, "times": times, "log": folder / "steps.log"}
    overrides = "".join(f"\n  task.{key}: {value}" for key, value in task.items())
    text = path.read_text().replace("every: 1", "every: 3, max_failures: 1")
    path.write_text(text.replace("overrides:", f"overrides:{overrides}"))
    return path


def steps_in(folder: Path) -> list[int]:
    return [int(step) for step in (folder / "steps.log").read_text().split()]


@pytest.mark.ray
@pytest.mark.usefixtures("project", "two_cpus")
def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint_to_the_same_table(tmp_path: Path) -> None:
    tables, steps = {}, {}
    for times in (0, 1):
        folder = tmp_path / str(times)
        folder.mkdir()
        results = tune(write_deadly_sweep(folder, times=times, searcher="random"))
        assert (results.num_terminated, results.num_errors) == (2, 0)
        tables[times] = pq.read_table(folder / "sweep/results.parquet").to_pylist()
        steps[times] = steps_in(folder)
    assert [(row["outcome"], row["step"]) for row in tables[0]] == [("finished", 9)] * 2
    assert steps[0] == [*range(9), *range(9)]
    # The first trial, killed in its eighth step, does again what came after its checkpoint of 6 steps.
    assert steps[1] == [*range(8), *range(6, 9), *range(9)]
    assert tables[1] == tables[0]


@pytest.mark.ray
@pytest.mark.usefixtures("project", "two_cpus")
@pytest.mark.long
def test_a_trial_whose_process_dies_every_time_is_given_up_and_the_others_end(tmp_path: Path) -> None:
    path = write_deadly_sweep(tmp_path, times=99, searcher="grid")
    text = path.read_text().replace("algorithm.inner_lr: loguniform(1e-3, 0.1)", "task.dies_at: grid(98, 7, 99)")
    # With so large a rate the loss is higher after 9 steps than after 6.
    path.write_text(text.replace("overrides:", "overrides:\n  outer.lr: 0.25"))
    results = tune(path)
    assert (results.num_terminated, results.num_errors) == (2, 1)
    # The second one is begun again once, from its checkpoint.
    assert steps_in(tmp_path) == [*range(9), *range(8), *range(6, 8), *range(9)]
    table = pq.read_table(tmp_path / "sweep/results.parquet").to_pylist()
    assert [(row["outcome"], row["step"]) for row in table] == [("finished", 9), ("failed", 6), ("finished", 9)]
    assert [row["error"] is None for row in table] == [True, False, True]
    assert "its worker process has died" in table[1]["error"]
    assert "common causes" not in table[1]["error"]
    # Its last validation was the best of all, and yet it is not the best trial.
    assert table[1]["loss"] < table[0]["loss"] == table[2]["loss"]
    assert load_config(tmp_path / "sweep/best.yaml").task.dies_at == 98


@pytest.mark.ray
@pytest.mark.head
@pytest.mark.long
def test_a_sweep_whose_driver_is_killed_goes_on_to_the_same_table(ray_home: dict[str, str], tmp_path: Path) -> None:
    tables = []
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        path = write_sweep(folder, workers=0, trials=3, scheduler="{name: asha}", searcher="tpe", at_once=1)
        command = [sys.executable, "-m", "metadist", "tune", str(path), "--json"]
        if name == "killed":
            kill_in_the_second_trial(command, ray_home, folder / "sweep/trials/00001/reports.json")
            command.append("--resume")
        done = subprocess.run(command, env=ray_home, capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 0, done.stderr
        tables.append(json.loads(done.stdout)["trials"])
    assert {row["outcome"] for row in tables[0]} == {"finished", "stopped"}
    assert tables[1] == tables[0]


def kill_in_the_second_trial(command: list[str], environment: dict[str, str], reports: Path) -> None:
    """SIGKILL of the whole process group, as soon as the trial has told something."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + WAIT_S
    while not reports.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the second trial told nothing in time"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
