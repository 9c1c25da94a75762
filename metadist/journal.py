"""The journal of a run: what is shown, logged and saved beside the training loop, in an order that survives a kill."""

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.text import Text

from metadist.bad_episodes import BAD_EPISODES_FILE, BadEpisodes
from metadist.callbacks import Callback, Fault, Status
from metadist.checkpoint import Checkpoints, CheckpointWriter
from metadist.config import Config
from metadist.core.bad_episode import BadEpisode
from metadist.core.plan import Plan
from metadist.distributed.executor import Executor
from metadist.distributed.learner import LearnerState
from metadist.errors import LearnerLostError, RanksResizedError
from metadist.experiment import Experiment
from metadist.run_directory import RunDirectory
from metadist.scores import Evaluation
from metadist.timeline import TIMELINE_FILE, TimeLine
from metadist.tracking import METRICS_FILE, Progress, Tracker, read_metrics, without_nan


class Journal:
    """Metrics, progress, TensorBoard, callbacks and checkpoints of one call of `fit`.

    Metrics are flushed before the checkpoint of the same step is written; whatever a kill tears off
    after that is cut away on resume and made again.
    """

    def __init__(
        self,
        config: Config,
        experiment: Experiment,
        directory: RunDirectory,
        console: Console,
        state: LearnerState | None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._config, self._directory, self._console = config, directory, console
        self._checkpoints = Checkpoints(directory, experiment.theta, experiment.network.statistics_layout)
        self._writer = CheckpointWriter(self._checkpoints, config.run.checkpoint_config.num_to_keep)
        self._failures = 0
        self.last_metrics: dict[str, Any] = {}
        self._callbacks = callbacks
        self._step = step = state.step if state else 0
        self._adapters_lost = 0
        directory.fetch(METRICS_FILE)
        directory.fetch(TIMELINE_FILE)
        directory.fetch(BAD_EPISODES_FILE)
        self._bad = BadEpisodes(directory.local, step, config.training)
        self._timeline = TimeLine(directory.local, step, config.run.log_every)
        self._tracker = Tracker(directory.local, step, config.run.log_every)
        self._progress = Progress(console, config.training.steps, step, config.training.meta_batch_size)

    def __enter__(self) -> "Journal":
        for callback in self._callbacks:
            callback.on_start(self._config, self._directory.location, self._step)
        self._progress.__enter__()
        self._timeline.restart()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        try:
            self.close()
        finally:
            for callback in self._callbacks:
                callback.on_end(self._step)

    @property
    def tasks_per_second(self) -> float:
        return self._progress.tasks_per_second

    def record(self, plan: Plan, metrics: dict[str, float], executor: Executor) -> None:
        """A step is done, with these metrics. Raises BadEpisodesError where too many of its tasks were left out."""
        self._step = step = plan.step + 1
        self._leave_out(plan, executor.bad_episodes)
        last = step == self._config.training.steps
        self.last_metrics = without_nan(metrics)
        lost = executor.counters.adapters_lost
        self._progress.step(step, metrics, executor.num_adapters, lost, self._bad.count)
        self._tracker.step(step, metrics, self.tasks_per_second, last)
        seconds = self._timeline.step(step, executor.seconds, last)
        if seconds is not None:
            self._tracker.timeline(step, seconds)
        if lost > self._adapters_lost:
            self._tell_fault("adapter_lost", f"{lost - self._adapters_lost} adapters died and were replaced")
            self._adapters_lost = lost
        recomputed = executor.counters.chunks_recomputed
        status = Status(
            executor.num_adapters,
            lost,
            recomputed,
            self.tasks_per_second,
            executor.seconds,
            executor.counters.peak_device_bytes,
            executor.counters.chunks_given_twice,
        )
        for callback in self._callbacks:
            callback.on_step(step, metrics, status)

    def validation(self, step: int, scores: dict[str, float]) -> None:
        """Scores on the validation split after `step` steps."""
        self._tracker.validation(step, scores)
        accuracy = "" if math.isnan(scores["accuracy"]) else f"  accuracy {scores['accuracy']:.2%}"
        self._console.print(f"step {step}  validation loss {scores['loss']:.4f}{accuracy}")
        self._tell_evaluation("val", scores)
        self._timeline.restart()

    def evaluation(self, evaluation: Evaluation) -> None:
        """The final evaluation, after the last step."""
        self._tell_evaluation(evaluation.split, evaluation.means())

    def checkpoint(self, state: LearnerState) -> None:
        """Begins to write a checkpoint; training goes on meanwhile."""
        self._tracker.flush()
        self._timeline.flush()
        self._bad.flush()
        self._directory.upload()
        self._writer.save(state, self._best_step())
        if any(callback.awaits_checkpoints for callback in self._callbacks):
            self._writer.wait()
        for callback in self._callbacks:
            callback.on_checkpoint(state.step)
        self._timeline.restart()

    def recover(self, error: LearnerLostError) -> LearnerState | None:
        """What to go on from after the learner was lost: the last checkpoint, None for the start."""
        self._failures += not isinstance(error, RanksResizedError)
        allowed = self._config.run.failure_config.max_failures
        if 0 <= allowed < self._failures:
            raise error
        self._writer.wait()
        state = self._checkpoints.load_latest(lambda text: self._console.print(Text(text, "yellow")))
        step = state.step if state else 0
        self._console.print(Text(f"{error}. Going on from step {step}.", "yellow"))
        self._tell_fault("learner_lost", f"{error}. Going on from step {step}.")
        self._step = step
        self._tracker.rewind(step)
        self._timeline.rewind(step)
        self._bad.rewind(step)
        return state

    def close(self) -> None:
        """Everything is on disk. May be called twice."""
        try:
            self._writer.close()
        finally:
            self._timeline.close()
            self._tracker.close()
            self._bad.close()

    def _leave_out(self, plan: Plan, episodes: list[BadEpisode]) -> None:
        if not episodes:
            return
        is_first = not self._bad.count
        self._bad.add(plan, episodes)
        what = f"task {episodes[0].key} is left out: {episodes[0].reason}"
        if is_first:
            self._console.print(Text(f"{what}. This and any more are in {BAD_EPISODES_FILE}.", "yellow"))
        more = f", and {len(episodes) - 1} more" if len(episodes) > 1 else ""
        self._tell_fault("bad_episodes", f"{what}{more}")

    def _tell_evaluation(self, split: str, scores: dict[str, float]) -> None:
        for callback in self._callbacks:
            callback.on_evaluation(self._step, split, scores)

    def _tell_fault(self, fault: Fault, text: str) -> None:
        for callback in self._callbacks:
            callback.on_fault(self._step, fault, text)

    def _best_step(self) -> int | None:
        """The checkpointed step with the best validation so far, by accuracy or else by loss."""
        saved = set(self._checkpoints.steps())
        scored = []
        for line in read_metrics(self._directory.local):
            if line.get("val_loss") is not None and line["step"] in saved:
                accuracy = line["val_accuracy"]
                scored.append((accuracy if accuracy is not None else -line["val_loss"], line["step"]))
        return max(scored)[1] if scored else None
