"""What training asks of the machines, whatever they are: this process, or a Ray cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from metadist.callbacks import Callback
from metadist.core.bad_episode import BadEpisode
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.meta_gradient import EpisodeScores
from metadist.core.plan import Plan, Range
from metadist.distributed.learner import LearnerState
from metadist.distributed.seconds import Seconds

Handle = Any
"""Stands for a value that lies somewhere: the value itself in one process; with Ray, a reference to it."""


@dataclass
class Counters:
    """What happened to the adapters in a run so far."""

    adapters_lost: int = 0
    chunks_recomputed: int = 0
    chunks_given_twice: int = 0
    """Given to another adapter too, since the first was late."""
    peak_device_bytes: int = 0
    """The most GPU memory that the tensors of one adapter have taken; 0 on CPUs."""


class Executor(Protocol):
    """Runs plans on adapters and keeps the learner. Every one gives the bits of the in-process one."""

    counters: Counters
    seconds: Seconds
    """Of the last step."""
    bad_episodes: list[BadEpisode]
    """Those that the last step leaves out of its mean, in the order of their tasks."""
    callbacks: Sequence[Callback]
    """To be told what happens, beside the user's own: the cluster's metrics, where there is a cluster."""

    def start(self, state: LearnerState | None, expected: dict[str, Any] | None, stop: Callable[[], bool]) -> dict:
        """Starts adapters and the learner; gives the numeric fingerprint.

        `state` is what to go on from. Adapters whose fingerprint is not `expected` are refused. While it
        waits for machines it asks `stop`, and raises InterruptedRun if that says so.
        """

    @property
    def num_adapters(self) -> int:
        """Adapters that are ready for work."""

    @property
    def is_leaving(self) -> bool:
        """Whether this process's node is about to be taken away: the run then ends as one that is interrupted."""

    def publish(self) -> Handle:
        """Theta and running statistics at which the next step's meta-gradients are taken, to be given to `run`."""

    def newest(self) -> Handle:
        """The learner's theta and running statistics, to be given to `evaluate`: those of `publish` without a lag."""

    def run(self, plan: Plan, theta: Handle) -> dict[Range, Handle]:
        """The sums of ranges that cover the plan's chunks."""

    def step(self, plan: Plan, theta: Handle, sums: dict[Range, Handle]) -> dict[str, float]:
        """One outer step; gives its metrics. Raises LearnerLostError where the learner is gone."""

    def evaluate(self, plan: Plan, theta: Handle, inner_steps: int, policies: list[BatchNormPolicy]) -> EpisodeScores:
        """Scores of adapted models over a plan of evaluation episodes, in the order of their keys."""

    def state(self) -> LearnerState:
        """The learner's state. Raises LearnerLostError where the learner is gone."""

    def replace_learner(self, state: LearnerState | None) -> None:
        """A new learner in place of a lost one, going on from `state` (None: from the start)."""

    def close(self) -> None:
        """Ends every process that `start` began. May be called twice."""
