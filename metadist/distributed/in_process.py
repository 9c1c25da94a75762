"""The reference executor: one adapter and the learner in this process, without Ray."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from metadist.callbacks import Callback
from metadist.core.bad_episode import BadEpisode
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.meta_gradient import EpisodeScores, Sums
from metadist.core.outer import OuterSettings
from metadist.core.plan import Plan, Range
from metadist.distributed.adapter import Adapter
from metadist.distributed.executor import Counters
from metadist.distributed.fingerprint import refuse_other
from metadist.distributed.learner import Learner, LearnerState
from metadist.distributed.receipt import Receipt
from metadist.distributed.seconds import Seconds
from metadist.experiment import Experiment


class InProcessExecutor:
    """Implements `Executor` with plain calls."""

    def __init__(self, experiment: Experiment, outer: OuterSettings, num_steps: int) -> None:
        self.counters = Counters()
        self.seconds = Seconds()
        self.bad_episodes: list[BadEpisode] = []
        self.callbacks: Sequence[Callback] = ()
        self._arguments = (experiment, outer, num_steps)
        self._threads_before = torch.get_num_threads()

    def start(
        self, state: LearnerState | None, expected: dict[str, Any] | None, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        del stop
        # Of one function torch compiles only so many versions in a process, and then runs it uncompiled, with other
        # bits: those of earlier runs in this process must not count.
        torch.compiler.reset()
        self._adapter = Adapter(self._arguments[0])
        self.replace_learner(state)
        fingerprint = self._adapter.fingerprint()
        refuse_other(fingerprint, expected, "this process")
        return fingerprint

    @property
    def num_adapters(self) -> int:
        return 1

    @property
    def is_leaving(self) -> bool:
        return False

    def publish(self) -> np.ndarray:
        return self._learner.publish()

    def newest(self) -> np.ndarray:
        return self._learner.newest()

    def run(self, plan: Plan, theta: np.ndarray) -> dict[Range, Sums]:
        sums, receipt = {}, Receipt()
        for span in plan.ranges(1):
            sums[span] = self._adapter.sum_range(plan, span, theta)
            receipt += self._adapter.take_receipt()
        self.seconds, self.bad_episodes = receipt.seconds, receipt.bad_in_order()
        self.counters.peak_device_bytes = max(self.counters.peak_device_bytes, receipt.device_bytes)
        return sums

    def step(self, plan: Plan, theta: np.ndarray, sums: dict[Range, Sums]) -> dict[str, float]:
        del theta
        metrics = self._learner.step(plan, sums)
        self.seconds += self._learner.seconds
        return metrics

    def evaluate(
        self, plan: Plan, theta: np.ndarray, inner_steps: int, policies: list[BatchNormPolicy]
    ) -> EpisodeScores:
        return self._adapter.score_range(plan, Range(0, plan.num_chunks), theta, inner_steps, policies)

    def state(self) -> LearnerState:
        return self._learner.state()

    def replace_learner(self, state: LearnerState | None) -> None:
        self._learner = Learner(*self._arguments)
        if state is not None:
            self._learner.restore(state)

    def close(self) -> None:
        torch.set_num_threads(self._threads_before)
