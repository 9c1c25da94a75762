"""Computing one chunk of a run again, task by task, in this process."""

import pdb
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from metadist.checkpoint import Checkpoints
from metadist.config import Config
from metadist.core.keys import TaskKey
from metadist.core.meta_gradient import MetaGradient
from metadist.core.plan import Plan, plan_step
from metadist.core.task_source import spec_of
from metadist.distributed.in_process import InProcessExecutor
from metadist.distributed.learner import LearnerState
from metadist.errors import CheckpointError, FingerprintError, MetadistError, RunDirectoryError, UserError, first_line
from metadist.evaluation import load_run_config
from metadist.experiment import Experiment, make_experiment
from metadist.run_directory import RunDirectory
from metadist.tracking import without_nan


@dataclass(frozen=True)
class ReplayedTask:
    """One task of the chunk; None where it did not come so far, or a value is NaN or infinite."""

    task: str
    loss: float | None
    accuracy: float | None
    gradient_norm: float | None
    bad: str | None
    """Why the task cannot be learned from."""


@dataclass(frozen=True)
class Replay:
    """What a chunk was, as it is computed here."""

    run_dir: str
    step: int
    chunk: int
    source: str
    from_step: int
    """The checkpoint's that theta was computed from; 0 is the start."""
    tasks: list[ReplayedTask]

    @property
    def steps_replayed(self) -> int:
        return self.step - self.from_step

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `metadist replay --json` prints them."""
        return asdict(self) | {"steps_replayed": self.steps_replayed, "tasks": [asdict(task) for task in self.tasks]}

    def table(self) -> Table:
        """A row a task."""
        table = Table(title=f"step {self.step}, chunk {self.chunk}, task source {self.source}", title_justify="left")
        table.add_column("task", no_wrap=True)
        for name in ("query loss", "accuracy", "gradient norm"):
            table.add_column(name, justify="right")
        table.add_column("bad")
        for task in self.tasks:
            values = [task.loss, task.accuracy, task.gradient_norm]
            table.add_row(task.task, *("-" if v is None else f"{v:.6g}" for v in values), Text(task.bad or "", "red"))
        return table


def replay(
    run_dir: str,
    *,
    step: int,
    chunk: int,
    config: Config | None = None,
    debug: bool = False,
    allow_numeric_drift: bool = False,
    console: Console | None = None,
) -> Replay:
    """Computes chunk `chunk` of step `step` (as in errors, from 0) at the theta that the run had there.

    That theta is made by repeating the steps since the checkpoint before it, with the run's bits. With
    `debug`, Python's debugger opens at each bad task. `config` is needed only where the run's task,
    model or algorithm is an object of your own program. Raises UserError for wrong input.
    """
    console = console or Console(stderr=True)
    directory = RunDirectory(run_dir)
    try:
        config = config or load_run_config(directory)
        plan = _plan(config, step, chunk)
        experiment = make_experiment(config)
        saved = _checkpoint_before(directory, experiment, step, console)
        from_step = saved.step if saved else 0
        state = saved or LearnerState(0, experiment.initial_theta, experiment.initial_statistics)
        if from_step < step:
            expected = None if allow_numeric_drift else directory.read_json("fingerprint.json")
            state = _state_at(plan, config, experiment, state, expected, console)
        tasks = _task_by_task(experiment, state, plan, chunk, console if debug else None)
        return Replay(directory.location, step, chunk, type(experiment.source).__name__, from_step, tasks)
    finally:
        directory.close()


def _plan(config: Config, step: int, chunk: int) -> Plan:
    training = config.training
    if step >= training.steps:
        raise UserError(
            f"--step must be below the run's training.steps = {training.steps}, got {step}: they count from 0."
        )
    plan = plan_step(training.seed, step, training.meta_batch_size, training.tasks_per_chunk)
    if chunk >= plan.num_chunks:
        raise UserError(f"--chunk must be below {plan.num_chunks}, the run's chunks a step, got {chunk}.")
    return plan


def _checkpoint_before(
    directory: RunDirectory, experiment: Experiment, step: int, console: Console
) -> LearnerState | None:
    """The newest good checkpoint of at most `step` steps; None where there is none, so that it goes from the start."""
    checkpoints = Checkpoints(directory, experiment.theta, experiment.network.statistics_layout)
    for saved in sorted((saved for saved in checkpoints.steps() if saved <= step), reverse=True):
        try:
            return checkpoints.load(saved)
        except CheckpointError as error:
            console.print(Text(f"{error} Trying the one before.", "yellow"))
    return None


def _state_at(
    plan: Plan,
    config: Config,
    experiment: Experiment,
    saved: LearnerState,
    expected: dict[str, Any] | None,
    console: Console,
) -> LearnerState:
    """The state after `plan.step` steps, computed again from `saved`. Raises FingerprintError where bits differ."""
    executor = InProcessExecutor(experiment, config.outer, config.training.steps)
    try:
        executor.start(saved, expected, lambda: False)
        console.print(f"Repeating the steps {saved.step} to {plan.step - 1}, to the theta before step {plan.step}")
        for number in range(saved.step, plan.step):
            earlier = plan_step(plan.run_seed, number, plan.num_tasks, plan.chunk_size)
            theta = executor.publish()
            executor.step(earlier, theta, executor.run(earlier, theta))
        return executor.state()
    except FingerprintError as error:
        raise RunDirectoryError(f"{error} Replay where it trained, or add --allow-numeric-drift.") from None
    finally:
        executor.close()


def _task_by_task(
    experiment: Experiment, state: LearnerState, plan: Plan, chunk: int, debugging: Console | None
) -> list[ReplayedTask]:
    compute = MetaGradient(experiment.algorithm, experiment.network, experiment.theta, strategy="loop", compile=False)
    weights = plan.weights(chunk)
    return [
        _replay_task(experiment, compute, state, key, debugging)
        for key, weight in zip(plan.keys(chunk), weights, strict=True)
        if weight
    ]


def _replay_task(
    experiment: Experiment, compute: MetaGradient, state: LearnerState, key: TaskKey, debugging: Console | None
) -> ReplayedTask:
    theta, statistics = torch.tensor(state.published).split([len(state.theta), len(state.statistics)])
    loss = accuracy = norm = None
    bad = None
    try:
        batch = experiment.source.sample([key])
        spec_of(experiment.source, key.split).check(batch, [key], experiment.source)
        ((_, outcome),) = compute.one_by_one(theta, statistics, batch, [key])
        if isinstance(outcome, Exception):
            raise outcome
        gradient, _, metrics = outcome
        loss, accuracy = map(float, metrics)
        norm = float(torch.linalg.vector_norm(gradient.double()))
    except Exception as error:
        bad = str(error) if isinstance(error, MetadistError) else f"{type(error).__name__}: {first_line(error)}"
        if debugging:
            debugging.print(Text(f"{key}: {bad}"))
            pdb.post_mortem(error.__traceback__)
    else:
        if not np.isfinite(loss) or not np.isfinite(norm):
            bad = f"query loss is {loss:g}" + ("" if np.isfinite(norm) else f", gradient norm {norm:g}")
            if debugging:
                debugging.print(Text(f"{key}: {bad}. Here are batch, theta, gradient and metrics."))
                pdb.set_trace()
    values = without_nan({"loss": loss, "accuracy": accuracy, "gradient_norm": norm})
    return ReplayedTask(task=str(key), bad=bad, **values)
