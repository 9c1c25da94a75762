"""The executor on Ray: adapters and the learner are actors; what an adapter loses another computes again."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.meta_gradient import EpisodeScores, Sums
from metadist.core.outer import OuterSettings
from metadist.core.plan import Plan, Range
from metadist.distributed.adapter import Adapter
from metadist.distributed.executor import Counters
from metadist.distributed.fingerprint import refuse_other
from metadist.distributed.learner import Learner, LearnerState
from metadist.distributed.ledger import Ledger
from metadist.distributed.placement import LEARNER_CPUS, adapter_options
from metadist.errors import (
    AdapterError,
    ClusterError,
    FingerprintError,
    InterruptedRun,
    LearnerLostError,
    MetadistError,
    first_line,
)
from metadist.experiment import Experiment
from metadist.sections import ScalingSettings

POLL_S = 1.0
"""How often a wait looks up to see whether it should stop."""
MAX_FAILED_STARTS = 3
"""Adapters that die one after another before any of them was ready, until the run gives up."""

_LOST = (RayActorError, WorkerCrashedError)


class AdapterActor:
    """An adapter as an actor. Errors of its making are raised by `prepare`, where they keep their type."""

    def prepare(self, experiment: list[ray.ObjectRef]) -> dict[str, Any]:
        """Takes the experiment from the object store, its arrays shared with the node; gives the fingerprint."""
        self.adapter = Adapter(ray.get(experiment[0]))
        return self.adapter.fingerprint()

    def sum_range(self, plan: Plan, span: Range, published: np.ndarray) -> tuple[None, Sums]:
        """A small receipt for the driver, and the sums, which go to the learner without passing the driver."""
        return None, self.adapter.sum_range(plan, span, published)

    def score_range(
        self, plan: Plan, span: Range, published: np.ndarray, inner_steps: int, policies: list[BatchNormPolicy]
    ) -> tuple[None, EpisodeScores]:
        """Likewise for evaluation."""
        return None, self.adapter.score_range(plan, span, published, inner_steps, policies)


class LearnerActor:
    """The learner as an actor."""

    def prepare(
        self, experiment: list[ray.ObjectRef], outer: OuterSettings, num_steps: int, state: LearnerState | None
    ) -> np.ndarray:
        """Starts from `state`; gives the published vector."""
        self.learner = Learner(ray.get(experiment[0]), outer, num_steps)
        if state is not None:
            self.learner.restore(state)
        return self.learner.publish()

    def step(
        self, plan: Plan, spans: list[Range], sums: list[ray.ObjectRef]
    ) -> tuple[dict[str, float] | list[Range], np.ndarray | None]:
        """One outer step and the new published vector; or, with nothing done, the ranges whose sums are gone."""
        values: dict[Range, Sums] = {}
        lost = []
        for span, reference in zip(spans, sums, strict=True):
            try:
                values[span] = ray.get(reference)
            except ObjectLostError:
                lost.append(span)
        if lost:
            return lost, None
        return self.learner.step(plan, values), self.learner.publish()

    def state(self) -> LearnerState:
        return self.learner.state()


@dataclass(eq=False)
class _Slot:
    """A place for one adapter: starting until its fingerprint is there, then ready until its actor dies."""

    actor: Any
    starting: ray.ObjectRef | None
    busy: bool = False
    failed_starts: int = 0


class RayExecutor:
    """Implements `Executor` with one actor an adapter and one for the learner.

    Between `min` and `max` adapters: those that the cluster has no room for yet stay asked for, and
    join when room comes. A dead one is replaced, and its unfinished ranges go to the others.
    """

    def __init__(
        self,
        experiment: Experiment,
        outer: OuterSettings,
        num_steps: int,
        scaling: ScalingSettings,
        disconnect: Callable[[], None] = lambda: None,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.counters = Counters()
        self._scaling = scaling
        self._disconnect = disconnect
        self._notify = notify
        self._experiment = [ray.put(experiment)]
        self._learner_arguments = (self._experiment, outer, num_steps)
        self._fingerprint: dict[str, Any] | None = None
        self._slots: list[_Slot] = []
        self._learner: Any = None
        self._stop: Callable[[], bool] = lambda: False

    def start(
        self, state: LearnerState | None, expected: dict[str, Any] | None, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        self._stop = stop
        self._fingerprint = expected
        low, high = self._scaling.worker_limits
        # The first adapter compiles; the others then find its code in the node's cache.
        self._slots = [self._new_slot()]
        self._wait_for_adapters(1)
        self._slots += [self._new_slot() for _ in range(high - 1)]
        self.replace_learner(state)
        self._wait_for_adapters(low)
        assert self._fingerprint is not None
        return self._fingerprint

    @property
    def num_adapters(self) -> int:
        return sum(slot.starting is None for slot in self._slots)

    def publish(self) -> ray.ObjectRef:
        return self._published

    def run(self, plan: Plan, theta: ray.ObjectRef) -> dict[Range, ray.ObjectRef]:
        return self._sums(plan, theta, plan.ranges(self.num_adapters))

    def step(self, plan: Plan, theta: ray.ObjectRef, sums: dict[Range, ray.ObjectRef]) -> dict[str, float]:
        while True:
            call = self._learner.step.options(num_returns=2).remote(plan, list(sums), list(sums.values()))
            report = self._ask_learner(call[0])
            if isinstance(report, dict):
                self._published = call[1]
                return report
            self.counters.chunks_recomputed += sum(span.stop - span.start for span in report)
            sums |= self._sums(plan, theta, report)

    def evaluate(
        self, plan: Plan, theta: ray.ObjectRef, inner_steps: int, policies: list[BatchNormPolicy]
    ) -> EpisodeScores:
        def submit(slot: _Slot, span: Range) -> tuple[ray.ObjectRef, ray.ObjectRef]:
            call: tuple[ray.ObjectRef, ray.ObjectRef] = slot.actor.score_range.options(num_returns=2).remote(
                plan, span, theta, inner_steps, policies
            )
            return call

        scores: dict[Range, EpisodeScores] = {}
        # Four ranges an adapter: short enough to share the work evenly, long enough to outweigh the calls.
        missing = plan.ranges(4 * self.num_adapters)
        while missing:
            found = self._compute(Ledger("evaluation", missing), submit)
            missing = []
            for span, reference in found.items():
                try:
                    scores[span] = ray.get(reference)
                except ObjectLostError:
                    missing.append(span)
        parts = [scores[span] for span in sorted(scores)]
        return EpisodeScores(*(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)))

    def state(self) -> LearnerState:
        state: LearnerState = self._ask_learner(self._learner.state.remote())
        return state

    def replace_learner(self, state: LearnerState | None) -> None:
        if self._learner is not None:
            ray.kill(self._learner)
        actor = ray.remote(LearnerActor).options(
            num_cpus=LEARNER_CPUS,
            # Beside the driver, which writes its checkpoints.
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
        )
        self._learner = actor.remote()
        self._published = self._learner.prepare.remote(*self._learner_arguments, state)
        self._ask_learner(self._published)

    def close(self) -> None:
        actors = [slot.actor for slot in self._slots] + ([self._learner] if self._learner is not None else [])
        self._slots, self._learner = [], None
        for actor in actors:
            ray.kill(actor)
        disconnect, self._disconnect = self._disconnect, lambda: None
        disconnect()

    def _sums(self, plan: Plan, theta: ray.ObjectRef, ranges: list[Range]) -> dict[Range, ray.ObjectRef]:
        def submit(slot: _Slot, span: Range) -> tuple[ray.ObjectRef, ray.ObjectRef]:
            call: tuple[ray.ObjectRef, ray.ObjectRef] = slot.actor.sum_range.options(num_returns=2).remote(
                plan, span, theta
            )
            return call

        return self._compute(Ledger(f"step {plan.step}", ranges), submit)

    def _compute(
        self, ledger: Ledger, submit: Callable[[_Slot, Range], tuple[ray.ObjectRef, ray.ObjectRef]]
    ) -> dict[Range, ray.ObjectRef]:
        """Hands out the ledger's ranges until all are done; gives where each result lies."""
        calls: dict[ray.ObjectRef, tuple[_Slot, Range, ray.ObjectRef]] = {}
        results: dict[Range, ray.ObjectRef] = {}
        for slot in self._slots:
            # A call left over from a plan that was given up only comes first in its actor's queue.
            slot.busy = False
        idle_since = time.monotonic()
        while not ledger.complete:
            for slot in self._slots:
                if slot.starting is None and not slot.busy and (span := ledger.submit(slot)):
                    receipt, result = submit(slot, span)
                    calls[receipt] = (slot, span, result)
                    slot.busy = True
            idle_since = time.monotonic() if calls else idle_since
            self._give_up_if(not calls and time.monotonic() - idle_since > self._scaling.start_timeout_s, 1)
            if not calls and self._stop():
                raise InterruptedRun("interrupted while no adapter was alive")
            starting = {slot.starting: slot for slot in self._slots if slot.starting is not None}
            ready, _ = ray.wait([*calls, *starting], num_returns=1, timeout=POLL_S)
            for reference in ready:
                if reference in starting:
                    self._admit(starting[reference])
                    continue
                slot, span, result = calls.pop(reference)
                slot.busy = False
                try:
                    ray.get(reference)
                except _LOST:
                    ledger.lost(slot)
                    self._replace(slot)
                except ObjectLostError as error:
                    # Only the published theta is passed in; the learner can publish it again.
                    raise LearnerLostError(f"the published theta was lost: {first_line(error)}") from None
                except RayTaskError as error:
                    ledger.failed(span, _cause(error))
                else:
                    if ledger.done(span):
                        results[span] = result
        self.counters.chunks_recomputed += ledger.chunks_lost
        return results

    def _wait_for_adapters(self, number: int) -> None:
        """Waits until so many adapters are ready. Raises ClusterError when the cluster has no room in time."""
        began = time.monotonic()
        while self.num_adapters < number:
            if self._stop():
                raise InterruptedRun("interrupted while adapters were starting")
            starting = {slot.starting: slot for slot in self._slots if slot.starting is not None}
            ready, _ = ray.wait(list(starting), num_returns=1, timeout=POLL_S)
            for reference in ready:
                self._admit(starting[reference])
            self._give_up_if(time.monotonic() - began > self._scaling.start_timeout_s, number)

    def _give_up_if(self, too_late: bool, needed: int) -> None:
        if too_late:
            raise ClusterError(
                f"{self.num_adapters} of at least {needed} adapters became ready within scaling.start_timeout_s ="
                f" {self._scaling.start_timeout_s:g} s. See `ray status` for what the cluster lacks, lower --workers,"
                " or raise the timeout (compiling a large model counts)."
            )

    def _new_slot(self) -> _Slot:
        actor: Any = ray.remote(AdapterActor).options(**adapter_options(self._scaling)).remote()
        return _Slot(actor, actor.prepare.remote(self._experiment))

    def _admit(self, slot: _Slot) -> None:
        """A starting adapter has answered: takes it in, replaces it if it died, refuses it if its bits differ."""
        assert slot.starting is not None
        try:
            fingerprint = ray.get(slot.starting)
        except _LOST as error:
            slot.failed_starts += 1
            if slot.failed_starts >= MAX_FAILED_STARTS:
                raise AdapterError(
                    f"{slot.failed_starts} adapters in a row died while starting: {first_line(error)}."
                    " Look into the worker logs of the Ray session (often: out of memory)."
                ) from None
            self._replace(slot)
            return
        except RayTaskError as error:
            raise _cause(error) from None
        try:
            refuse_other(fingerprint, self._fingerprint, "an adapter that Ray started")
        except FingerprintError as error:
            if self.num_adapters < max(1, self._scaling.worker_limits[0]):
                raise
            # There are enough others: this one is sent away, and the run goes on.
            self._notify(f"Refused: {error}")
            self._slots.remove(slot)
            ray.kill(slot.actor)
            return
        self._fingerprint = fingerprint
        slot.starting, slot.failed_starts = None, 0

    def _replace(self, slot: _Slot) -> None:
        self.counters.adapters_lost += 1
        fresh = self._new_slot()
        slot.actor, slot.starting, slot.busy = fresh.actor, fresh.starting, False

    def _ask_learner(self, call: ray.ObjectRef) -> Any:
        try:
            return ray.get(call)
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError as error:
            self.counters.learners_lost += 1
            raise LearnerLostError(f"the learner was lost: {first_line(error)}") from None


def _cause(error: RayTaskError) -> Exception:
    """The error as it was raised in the actor, if it is one of ours."""
    if isinstance(error.cause, MetadistError):
        return error.cause
    return AdapterError(f"an actor failed: {first_line(error)}") if error.cause is None else error.cause
