"""READ FIRST: meta-training, top to bottom.

A meta-iteration is the first five lines of the loop in `train`. Who computes which chunk, and what
fails on the way, changes no bit of its result.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from metadist.callbacks import Callback
from metadist.config import Config
from metadist.core.plan import plan_evaluation, plan_step
from metadist.distributed.executor import Executor
from metadist.distributed.learner import LearnerState
from metadist.distributed.start import make_executor
from metadist.errors import InterruptedRun, LearnerLostError
from metadist.evaluation import evaluate_with, save_evaluation
from metadist.experiment import check_splits, make_experiment
from metadist.interrupts import interruptible
from metadist.journal import Journal
from metadist.lease import Lease
from metadist.pictures import draw_timeline, draw_training
from metadist.resume import Resume, open_run
from metadist.run_directory import SPEC_FILE, RunDirectory
from metadist.scores import Evaluation, mean_and_interval
from metadist.sections import RunSettings, ScalingSettings
from metadist.tasks.remembered import remembered
from metadist.trackers import make_trackers

VALIDATION_SEED = 1
"""Validation episodes while training are other than those of `metadist evaluate --split val`, whose seed is 0."""


@dataclass(frozen=True)
class Result:
    """What a finished run gives."""

    run_dir: str
    step: int
    theta_sha256: str
    """Of the flat float32 vector of all meta-parameters."""
    optimizer_sha256: str
    """Of the optimizer's tensors, in the order of their names."""
    train: dict[str, Any]
    """Metrics of the last step; empty where there was none left to do."""
    evaluation: Evaluation | None
    tasks_per_second: float
    adapters_lost: int
    chunks_recomputed: int
    chunks_given_twice: int
    """To another adapter too, since the first was late with them."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `metadist train --json` prints them."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "evaluation"}
        return plain | {"evaluation": self.evaluation.as_dict() if self.evaluation else None}


class MetaTrainer:
    """Meta-trains a config, in the manner of Ray's trainers: `MetaTrainer(config).fit()`.

    `scaling_config` and `run_config` replace the config's sections `scaling` and `run`. With
    `num_workers=0` everything runs in this process, without Ray. `callbacks` are told what happens.
    """

    def __init__(
        self,
        config: Config,
        *,
        scaling_config: ScalingSettings | None = None,
        run_config: RunSettings | None = None,
        resume: Resume = "auto",
        allow_numeric_drift: bool = False,
        console: Console | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = dataclasses.replace(
            config, scaling=scaling_config or config.scaling, run=run_config or config.run
        )
        self._resume: Resume = resume
        self._allow_numeric_drift = allow_numeric_drift
        self._console = console or Console(stderr=True)
        self._callbacks = callbacks

    def fit(self, *, evaluate: bool = True) -> Result:
        """Trains to the last step, going on from the run directory's last checkpoint, then evaluates.

        SIGINT, SIGTERM and a notice that this node will be taken away end it after the step under way: it writes a
        checkpoint and raises InterruptedRun. Raises UserError for wrong input, before anything is computed.
        """
        config, console = self.config, self._console
        experiment = make_experiment(config)
        used = {"train", *(["val"] if config.evaluation.every else []), *([config.evaluation.split] * evaluate)}
        check_splits(experiment.source, config.training.seed, sorted(used))
        with ExitStack() as stack:
            # Given back last, after the last upload.
            lease = stack.enter_context(Lease(config.run_directory, console))
            directory = RunDirectory(config.run_directory, lambda text: console.print(Text(text, "yellow")))
            stack.callback(directory.close)
            state, expected = open_run(directory, config, experiment, self._resume, self._allow_numeric_drift, console)
            directory.write_json(SPEC_FILE, remembered(experiment.source))
            trackers = make_trackers(config.run.trackers, directory)
            executor = make_executor(config, experiment, console)
            stack.callback(executor.close)
            # After Ray has started: it puts a SIGTERM handler of its own in place.
            stop = stack.enter_context(interruptible(console))
            fingerprint = executor.start(state, expected, stop)
            directory.write_json("fingerprint.json", fingerprint)
            callbacks = [lease, *executor.callbacks, *trackers, *self._callbacks]
            journal = stack.enter_context(Journal(config, experiment, directory, console, state, callbacks))
            final = train(config, executor, journal, state, lambda: stop() or executor.is_leaving)
            draw_training(directory.local)
            draw_timeline(directory.local)
            evaluation = None
            if evaluate:
                evaluation = evaluate_with(executor, config, config.evaluation)
                journal.evaluation(evaluation)
                save_evaluation(evaluation, directory, config, experiment, final)
            return Result(
                run_dir=directory.location,
                step=final.step,
                theta_sha256=hashlib.sha256(final.theta.tobytes()).hexdigest(),
                optimizer_sha256=_sha256_of_optimizer(final),
                train=journal.last_metrics,
                evaluation=evaluation,
                tasks_per_second=journal.tasks_per_second,
                adapters_lost=executor.counters.adapters_lost,
                chunks_recomputed=executor.counters.chunks_recomputed,
                chunks_given_twice=executor.counters.chunks_given_twice,
            )


def train(
    config: Config, executor: Executor, journal: Journal, state: LearnerState | None, stop: Callable[[], bool]
) -> LearnerState:
    """Makes the steps that are left after `state`; gives the state after the last one.

    Raises InterruptedRun where `stop` asks for it.
    """
    training, checkpoint_every = config.training, config.run.checkpoint_config.checkpoint_frequency
    step = state.step if state else 0
    while step < training.steps and not stop():
        try:
            plan = plan_step(training.seed, step, training.meta_batch_size, training.tasks_per_chunk)
            theta = executor.publish()
            sums = executor.run(plan, theta)
            metrics = executor.step(plan, theta, sums)
            step += 1
            journal.record(plan, metrics, executor)
            if config.evaluation.every and step % config.evaluation.every == 0:
                journal.validation(step, validate(config, executor))
            if step % checkpoint_every == 0 or step == training.steps:
                state = executor.state()
                journal.checkpoint(state)
        except LearnerLostError as error:
            step, state = go_back(executor, journal, error), None
    if step < training.steps:
        if state is None or step > state.step:
            journal.checkpoint(executor.state())
        journal.close()
        raise InterruptedRun(f"Interrupted after step {step} of {training.steps}; the checkpoint is written.")
    assert state is not None, "a run has at least one step"
    return state


def go_back(executor: Executor, journal: Journal, lost: LearnerLostError) -> int:
    """Has another learner go on from the last checkpoint, and one more where that is lost too; gives its step."""
    while True:
        saved = journal.recover(lost)
        try:
            executor.replace_learner(saved)
        except LearnerLostError as again:
            lost = again
        else:
            return saved.step if saved else 0


def validate(config: Config, executor: Executor) -> dict[str, float]:
    """Mean loss and accuracy on the validation split's fixed episodes, under the run's batch-norm policy."""
    evaluation = config.evaluation
    plan = plan_evaluation(VALIDATION_SEED, "val", evaluation.val_episodes, config.training.tasks_per_chunk)
    policy = config.training.batch_norm or "transductive"
    scores = executor.evaluate(plan, executor.newest(), config.inner_steps_at_test, [policy])
    return {
        "loss": mean_and_interval(scores.loss[0, :, -1])["mean"],
        "accuracy": mean_and_interval(scores.accuracy[0, :, -1])["mean"],
    }


def _sha256_of_optimizer(state: LearnerState) -> str:
    digest = hashlib.sha256()
    for name in sorted(state.optimizer):
        digest.update(name.encode() + b"\0" + state.optimizer[name].tobytes())
    return digest.hexdigest()
