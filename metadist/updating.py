"""Meta-update: a few outer steps over new tasks, mixed with old ones, kept only if old tasks do not suffer.

New tasks alone would overwrite what was learned before (catastrophic forgetting; McCloskey & Cohen 1989, Psychol.
Learn. Motiv. 24, p. 109); old ones replayed beside them hold it (Robins 1995, Connect. Sci. 7, p. 123). A frozen list
of old episodes, the same before and after, decides.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from metadist.checkpoint import Checkpoints
from metadist.config import Config
from metadist.core.plan import plan_step
from metadist.core.task_source import spec_of
from metadist.distributed.executor import Executor
from metadist.distributed.learner import LearnerState
from metadist.distributed.start import make_executor
from metadist.errors import DataError, UserError
from metadist.evaluation import asked_of, evaluate_with, load_run_config, load_state, score_state
from metadist.experiment import Experiment, check_splits, make_experiment
from metadist.lease import Lease
from metadist.run_directory import RunDirectory
from metadist.scores import Evaluation, Score, mean_and_interval
from metadist.sections import EvaluationSettings
from metadist.tasks.own_tasks import MixedSource, OwnTask, OwnTaskSource, fitted_source, read_own_tasks, sha256_of
from metadist.versions import Versions

ROUNDS = 4
"""Times that each new task is drawn, where the number of steps is not given."""
LEAST_BATCH = 8
"""Tasks a step, where the run's meta-batch is smaller: a few steps average over few tasks."""
LEAST_RATE = 0.1
"""Of `outer.lr`: what an update learns with at least, however low the rate was when training ended."""
FROZEN_SEED = 2
"""Of the old episodes that decide; those of validation while training and of `metadist evaluate` are others."""
OWN_EPISODES = 100


@dataclass(frozen=True)
class Update:
    """What an update did. Scores are accuracy, or the loss in regression, each with its 95 % interval."""

    run_dir: str
    accepted: bool
    version: int
    """The version in use afterwards."""
    parent: int
    """The version that the update began with."""
    trained_steps: int
    """Steps of the run's own training when it was made."""
    tasks: int
    tasks_sha256: str
    steps: int
    lr: float
    share: float
    margin: float
    score: str
    """accuracy or loss"""
    old_before: Score
    old_after: Score
    old_change: Score
    """Paired, episode by episode; of a loss relative to what it was before."""
    own_before: Score
    """On the new tasks themselves, other episodes of which were learned from."""
    own_after: Score
    theta_sha256: str
    """Of the updated theta, whether it was accepted or not."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def worse_by(self) -> float:
        """How much old tasks lost: accuracy, or the share by which the loss rose."""
        change = self.old_change["mean"]
        return -change if self.score == "accuracy" else change


def update(
    run_dir: str,
    tasks: str,
    *,
    steps: int | None = None,
    lr: float | None = None,
    share: float = 0.5,
    margin: float = 0.005,
    episodes: int = 300,
    num_workers: int | tuple[int, int] | None = 0,
    invert: bool = False,
    config: Config | None = None,
    console: Console | None = None,
) -> Update:
    """Learns from the tasks in the directory `tasks`, and makes the result the run's new version if it is accepted.

    `share` of each step's tasks are new ones, the others are the run's own training tasks. Left out, `steps` draws
    each new task four times, and `lr` is the rate that training ended with, at least a tenth of `outer.lr`. Accepted
    if the mean accuracy on `episodes` frozen old episodes falls by no more than `margin` (in regression: if the mean
    loss rises by no more than that share). The same call gives the same bits for any number of workers.
    Raises UserError.
    """
    _check(steps, lr, share, margin)
    console = console or Console(stderr=True)
    with Lease(run_dir, console):
        directory = RunDirectory(run_dir)
        try:
            run_config = asked_of(config or load_run_config(directory), None, None, None, num_workers, None)
            trained = make_experiment(run_config)
            spec = spec_of(trained.source, "train")
            found = read_own_tasks(tasks, spec, invert=invert)
            state = load_state(directory, trained, None, console)
            versions = Versions(directory)
            checkpoints = Checkpoints(directory, trained.theta, trained.network.statistics_layout)
            trained_steps = max(checkpoints.steps(), default=0)
            work = _Update(run_config, trained, found, state, steps, lr, share, episodes, console)
            outcome = work.run()
            result = _judged(directory.location, versions.current, trained_steps, work, outcome, margin)
            if result.accepted:
                number = versions.add(outcome.state, result.as_dict(), trained)
                result = dataclasses.replace(result, version=number)
            return result
        finally:
            directory.close()


def roll_back(run_dir: str, to: int | None = None) -> int:
    """Makes the version before the current one, or version `to`, the current one; gives its number."""
    directory = RunDirectory(run_dir)
    try:
        load_run_config(directory)
        versions = Versions(directory)
        if to is None:
            current = versions.current
            if not current:
                raise UserError(f"{run_dir} is at version 0, its training's own; there is none before it.")
            to = int(versions.record(current)["parent"])
        versions.use(to)
        return to
    finally:
        directory.close()


def _check(steps: int | None, lr: float | None, share: float, margin: float) -> None:
    if steps is not None and steps < 1:
        raise UserError(f"steps must be 1 or more, got {steps}. Leave it out to have it follow from the tasks.")
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise UserError(f"lr must be above 0, got {lr:g}. Leave it out for the rate that training ended with.")
    if not 0 < share <= 1:
        raise UserError(f"share must be above 0 and at most 1, got {share:g}. Half is a good start.")
    if not 0 <= margin < 1:
        raise UserError(f"margin must be 0 or more and below 1 (100 points), got {margin:g}.")


@dataclass(frozen=True)
class _Outcome:
    state: LearnerState
    old: tuple[Evaluation, Evaluation]
    own: tuple[Evaluation, Evaluation]


class _Update:
    """One update's steps: old tasks scored, outer steps, the same old tasks scored again."""

    def __init__(
        self,
        config: Config,
        trained: Experiment,
        tasks: list[OwnTask],
        state: LearnerState,
        steps: int | None,
        lr: float | None,
        share: float,
        episodes: int,
        console: Console,
    ) -> None:
        if not config.algorithm.trains_on_episodes:
            raise UserError(
                f"{type(config.algorithm).__name__} trains on mini-batches of its pool's classes, not on tasks. Import"
                " the new classes into a pool (`metadist data import folder`) and train again."
            )
        self.tasks = tasks
        self.console = console
        training, outer = config.training, config.outer
        batch = max(training.meta_batch_size, LEAST_BATCH)
        self.steps = steps or math.ceil(ROUNDS * len(tasks) / (batch * share))
        last = outer.lr_at(max(0, training.steps - 1), training.steps)
        self.lr = lr if lr is not None else max(last, LEAST_RATE * outer.lr)
        old = fitted_source(trained.source, tasks)
        self.own = OwnTaskSource(tasks, old)
        self.share = share
        # Nothing is compiled for so few steps. The optimizer goes on too: one that began anew would make its first
        # steps as large for a small gradient as for a big one.
        self.state = state
        self.config = dataclasses.replace(
            config,
            task=MixedSource(self.own, batch, share),
            outer=dataclasses.replace(outer, lr=self.lr, lr_schedule=None, schedule="constant", warmup_steps=0, lag=0),
            training=dataclasses.replace(
                training,
                steps=state.step + self.steps,
                meta_batch_size=batch,
                chunk_size=training.tasks_per_chunk,
                compile=False,
            ),
            evaluation=EvaluationSettings(split=_split_of_old(old), episodes=episodes, seed=FROZEN_SEED),
        )

    def run(self) -> _Outcome:
        experiment = make_experiment(self.config)
        executor = make_executor(self.config, experiment, self.console)
        try:
            executor.start(self.state, None, lambda: False)
            before = self._score_old(executor)
            for step in track(range(self.state.step, self.config.training.steps), "updating", console=self.console):
                training = self.config.training
                plan = plan_step(training.seed, step, training.meta_batch_size, training.tasks_per_chunk)
                theta = executor.publish()
                executor.step(plan, theta, executor.run(plan, theta))
            after = self._score_old(executor)
            state = executor.state()
        finally:
            executor.close()
        return _Outcome(state, (before, after), (self._score_own(self.state), self._score_own(state)))

    def _score_old(self, executor: Executor) -> Evaluation:
        return evaluate_with(executor, self.config, self.config.evaluation, own_policy_alone=True)

    def _score_own(self, state: LearnerState) -> Evaluation:
        rounds = math.ceil(OWN_EPISODES / len(self.tasks))
        asked = EvaluationSettings(episodes=rounds * len(self.tasks), seed=FROZEN_SEED)
        config = dataclasses.replace(self.config, task=self.own, evaluation=asked)
        config = asked_of(config, None, None, None, num_workers=0, address=None)
        return score_state(config, make_experiment(config), state, self.console, own_policy_alone=True)


def _split_of_old(source: Any) -> Any:
    """val, whose classes were not trained on; where a pool has none of them, train."""
    try:
        check_splits(source, FROZEN_SEED, ["val"])
    except DataError:
        return "train"
    return "val"


def _judged(run_dir: str, parent: int, trained_steps: int, work: _Update, outcome: _Outcome, margin: float) -> Update:
    before, after = outcome.old
    score = before.scores[-1]

    def last(evaluation: Evaluation) -> np.ndarray:
        values: np.ndarray = getattr(evaluation.policies[0], f"episode_{score}")[:, -1].astype(np.float64)
        return values

    was, now = last(before), last(after)
    change = mean_and_interval((now - was) / (1 if score == "accuracy" else max(was.mean(), 1e-12)))
    result = Update(
        run_dir=run_dir,
        accepted=False,
        version=parent,
        parent=parent,
        trained_steps=trained_steps,
        tasks=len(work.tasks),
        tasks_sha256=sha256_of(work.tasks),
        steps=work.steps,
        lr=work.lr,
        share=work.share,
        margin=margin,
        score=score,
        old_before=mean_and_interval(was),
        old_after=mean_and_interval(now),
        old_change=change,
        own_before=mean_and_interval(last(outcome.own[0])),
        own_after=mean_and_interval(last(outcome.own[1])),
        theta_sha256=hashlib.sha256(outcome.state.theta.tobytes()).hexdigest(),
    )
    # Not below: NaN, of a diverged model, is no improvement.
    return dataclasses.replace(result, accepted=bool(result.worse_by <= margin))
