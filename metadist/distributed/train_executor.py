"""The second backend's executor: ranks under Ray Train that reduce among themselves, for big models on equal nodes.

The loop, the run directory and the journal stay with the driver, as with any executor; so a run goes on
under either backend, and ranks need not share a disk.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from metadist.callbacks import Callback
from metadist.core.bad_episode import BadEpisode
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.meta_gradient import EpisodeScores
from metadist.core.outer import OuterSettings
from metadist.core.plan import Plan, Range
from metadist.distributed import kept_actors
from metadist.distributed.all_reduce import PeerFailedError
from metadist.distributed.conductor import THREADS_BESIDE_RANKS, Conductor
from metadist.distributed.draining import ThisNode
from metadist.distributed.executor import Counters
from metadist.distributed.fingerprint import refuse_other
from metadist.distributed.learner import LearnerState
from metadist.distributed.placement import beside_the_driver
from metadist.distributed.rank import RankArguments
from metadist.distributed.ray_metrics import RayMetrics
from metadist.distributed.receipt import Receipt
from metadist.distributed.seconds import Seconds
from metadist.errors import AdapterError, ClusterError, InterruptedRun, LearnerLostError, first_line
from metadist.experiment import Experiment
from metadist.sections import ScalingSettings

POLL_S = 1.0
"""How often a wait looks up to see whether it should stop."""
CLOSE_TIMEOUT_S = 20.0
"""How long ranks may take to end by themselves."""


class TrainExecutor:
    """Implements `Executor` with a group of ranks; every one of them holds the learner.

    Where a rank is lost, Ray Train starts the group anew, and it goes on from the last checkpoint.
    """

    def __init__(
        self,
        experiment: Experiment,
        outer: OuterSettings,
        num_steps: int,
        scaling: ScalingSettings,
        max_failures: int,
        disconnect: Callable[[], None] = lambda: None,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.counters = Counters()
        self.seconds = Seconds()
        self.bad_episodes: list[BadEpisode] = []
        self.callbacks: Sequence[Callback] = (RayMetrics(),)
        self._scaling = scaling
        self._max_failures = max_failures
        self._disconnect = disconnect
        self._here = ThisNode(notify)
        self._arguments = RankArguments(
            [ray.put(experiment)], outer, num_steps, scaling.reduce == "exact", scaling.shard_optimizer
        )
        self._conductor: Any = None
        self._group = self._size = 0
        self._done: Plan | None = None
        self._fingerprint: dict[str, Any] | None = None
        self._stop: Callable[[], bool] = lambda: False

    def start(
        self, state: LearnerState | None, expected: dict[str, Any] | None, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        self._stop, self._fingerprint = stop, expected
        kept_actors.end_kept_but(self._scaling, {})
        conductor = ray.remote(Conductor).options(
            num_cpus=0,
            # Each rank that waits for its next call keeps one thread busy.
            max_concurrency=2 * self._scaling.worker_limits[1] + THREADS_BESIDE_RANKS,
            scheduling_strategy=beside_the_driver(),
        )
        self._conductor = conductor.remote()
        self._fit = self._conductor.fit.remote(self._arguments, self._scaling, self._max_failures, self._conductor)
        self._prepare(state)
        assert self._fingerprint is not None
        return self._fingerprint

    @property
    def num_adapters(self) -> int:
        return self._size

    @property
    def is_leaving(self) -> bool:
        return self._here.drains()

    def publish(self) -> None:
        """Every rank has theta already."""

    def newest(self) -> None:
        """Likewise."""

    def run(self, plan: Plan, theta: None) -> dict[Range, int]:
        """Which rank is to compute each range: the sums themselves never leave the ranks."""
        del theta
        return {span: number % self._size for number, span in enumerate(plan.ranges(self._size))}

    def step(self, plan: Plan, theta: None, sums: dict[Range, int]) -> dict[str, float]:
        del theta
        replies: list[tuple[dict[str, float], Receipt]] = self._ask("step", plan, self._by_rank(sums))
        receipt = sum((part for _, part in replies), Receipt())
        self.seconds = Seconds(*(total / self._size for total in receipt.seconds))
        self.bad_episodes = receipt.bad_in_order()
        self.counters.peak_device_bytes = max(self.counters.peak_device_bytes, receipt.device_bytes)
        self._done = plan
        # Every rank has made the same step.
        return replies[0][0]

    def evaluate(self, plan: Plan, theta: None, inner_steps: int, policies: list[BatchNormPolicy]) -> EpisodeScores:
        assigned = self._by_rank(self.run(plan, theta))
        scores: dict[Range, EpisodeScores] = {}
        for part in self._ask("score", plan, assigned, inner_steps, policies):
            scores |= part
        parts = [scores[span] for span in sorted(scores)]
        return EpisodeScores(*(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)))

    def state(self) -> LearnerState:
        (reference,) = self._ask("state")[0]
        try:
            state: LearnerState = ray.get(reference)
        except RayError as error:
            raise LearnerLostError(f"the learner's state was lost with rank 0: {first_line(error)}") from None
        return state

    def replace_learner(self, state: LearnerState | None) -> None:
        if self._done is not None:
            steps = self._done.step + 1 - (state.step if state else 0)
            self.counters.chunks_recomputed += steps * self._done.num_chunks
        self._done = None
        self._prepare(state)

    def close(self) -> None:
        conductor, self._conductor = self._conductor, None
        if conductor is not None:
            conductor.close.remote()
            # Ranks that never came need no farewell where Ray itself ends; in one that stays they would keep room.
            stays = self._disconnect is not ray.shutdown
            ray.wait([self._fit], timeout=CLOSE_TIMEOUT_S if self._size or stays else 0)
            ray.kill(conductor)
        disconnect, self._disconnect = self._disconnect, lambda: None
        disconnect()

    def _by_rank(self, ranges: dict[Range, int]) -> list[list[Range]]:
        return [[span for span, holder in ranges.items() if holder == rank] for rank in range(self._size)]

    def _prepare(self, state: LearnerState | None) -> None:
        """Has the group of ranks start from `state`: the first group, or the one after a loss."""
        reference = [ray.put(state)]
        prepared: list[dict[str, Any]] = []
        while not prepared:
            self._wait_for_group()
            # Ranks that are lost while they prepare: Ray Train starts others, until it gives up.
            with suppress(LearnerLostError):
                prepared = self._ask("prepare", reference)
        for rank, found in enumerate(prepared):
            # A float sum has the bits of its order: a run that was exact does not go on with it unsaid.
            fingerprint = found if self._scaling.reduce == "exact" else found | {"reduce": self._scaling.reduce}
            refuse_other(fingerprint, self._fingerprint, f"rank {rank} of {self._size}")
            self._fingerprint = fingerprint

    def _wait_for_group(self) -> None:
        began = time.monotonic()
        coming = self._conductor.group.remote(self._group)
        while not self._is_there(coming):
            if self._stop():
                raise InterruptedRun("Interrupted while ranks were starting.")
            if time.monotonic() - began > self._scaling.start_timeout_s:
                raise ClusterError(
                    f"the group of at least {self._scaling.worker_limits[0]} ranks did not start within"
                    f" scaling.start_timeout_s = {self._scaling.start_timeout_s:g} s. See `ray status` for what the"
                    " cluster lacks, lower --workers, or raise the timeout."
                )
        self._group, self._size = _value(coming)

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """The replies of all ranks. Raises the error of one that failed, LearnerLostError where the group is gone."""
        call = self._conductor.ask.remote(self._group, method, *arguments)
        while not self._is_there(call):
            pass
        replies = _value(call)
        if isinstance(replies, LearnerLostError):
            self.counters.adapters_lost = _value(self._conductor.ranks_lost.remote())
            raise replies
        for reply in replies:
            if isinstance(reply, Exception) and not isinstance(reply, PeerFailedError):
                raise reply
        return list(replies)

    def _is_there(self, call: ray.ObjectRef) -> bool:
        """Whether a call of the conductor is done, after at most `POLL_S`. Raises where Ray Train gave up."""
        ready, _ = ray.wait([call, self._fit], num_returns=1, timeout=POLL_S)
        if call not in ready and self._fit in ready:
            _value(self._fit)
            raise AdapterError("Ray Train ended the ranks before the run was done. Resume the run.")
        return call in ready


def _value(call: ray.ObjectRef) -> Any:
    """What a call of the conductor gave. Raises AdapterError where Ray Train gave up, or the conductor died."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        raise AdapterError(f"Ray Train gave up: {first_line(error.cause or error)}. Resume the run.") from None
    except RayError as error:
        raise AdapterError(f"the conductor of the ranks was lost: {first_line(error)}. Resume the run.") from None
