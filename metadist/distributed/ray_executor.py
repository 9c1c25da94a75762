"""The executor on Ray: adapters and the learner are actors; what an adapter loses another computes again."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import (
    ObjectLostError,
    RayError,
    RayTaskError,
)

from metadist.callbacks import Callback
from metadist.core.bad_episode import BadEpisode
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.meta_gradient import EpisodeScores
from metadist.core.outer import OuterSettings
from metadist.core.plan import Plan, Range
from metadist.distributed import combining, kept_actors
from metadist.distributed.actors import DEATHS, AdapterActor, LearnerActor, SumsLost
from metadist.distributed.draining import DrainingNodes, ThisNode
from metadist.distributed.executor import Counters
from metadist.distributed.fingerprint import refuse_other
from metadist.distributed.learner import LearnerState
from metadist.distributed.ledger import Ledger
from metadist.distributed.pace import Pace
from metadist.distributed.placement import adapter_options
from metadist.distributed.ray_metrics import RayMetrics
from metadist.distributed.remote_learner import RemoteLearner, cause_of
from metadist.distributed.seconds import Seconds
from metadist.distributed.work import Call, Result, Slot, Work, ready
from metadist.errors import (
    AdapterError,
    ClusterError,
    FingerprintError,
    InterruptedRun,
    LearnerLostError,
    first_line,
)
from metadist.experiment import Experiment
from metadist.sections import ScalingSettings

POLL_S = 0.25
"""How often a wait looks up to see whether it should stop, and whether a call is late."""
MAX_FAILED_STARTS = 3
"""Adapters that die one after another before any of them was ready, until the run gives up."""


class RayExecutor:
    """Implements `Executor` with one actor an adapter and one for the learner.

    Between `min` and `max` adapters: those that the cluster has no room for yet stay asked for, and
    join when room comes. A dead one is replaced, and its unfinished ranges go to the others. What a slow
    or hung one is late with (see `Pace`) is given to another too, and the first answer counts.

    While the learner steps, the next step's ranges are already with the adapters, which sample their episodes and
    wait for its theta: nobody waits for this process in between. With `outer.lag` they have that theta, and go on.

    What would be too much for the learner to take, adapters add up before: see `combining`.
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
        self.seconds = Seconds()
        self.bad_episodes: list[BadEpisode] = []
        self.callbacks: Sequence[Callback] = (RayMetrics(),)
        self._scaling = scaling
        self._disconnect = disconnect
        self._notify = notify
        self._experiment = [ray.put(experiment)]
        self._learner = RemoteLearner(self._experiment, outer, num_steps, scaling)
        self._num_steps = num_steps
        self._fingerprint: dict[str, Any] | None = None
        self._slots: list[Slot] = []
        self._ahead: Work | None = None
        self._overdue: dict[ray.ObjectRef, Call] = {}
        """Calls whose ranges others have answered: their adapters get nothing else until they come back."""
        self._draining = DrainingNodes()
        self._here = ThisNode(notify)
        self._looked = 0.0
        self._in_order = True
        """No work was broken off in the middle, which its adapters would still be at."""
        self._paces = {name: Pace(scaling.start_timeout_s) for name in ("sums", "combining", "scores")}
        self._bytes_a_sum = 4 * (len(experiment.initial_theta) + len(experiment.initial_statistics))
        self._stop: Callable[[], bool] = lambda: False

    def start(
        self, state: LearnerState | None, expected: dict[str, Any] | None, stop: Callable[[], bool]
    ) -> dict[str, Any]:
        self._stop = stop
        self._fingerprint = expected
        low, high = self._scaling.worker_limits
        kept_actors.end_kept_but(self._scaling, {AdapterActor: high, LearnerActor: 1})
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

    @property
    def is_leaving(self) -> bool:
        return self._here.drains()

    def publish(self) -> ray.ObjectRef:
        return self._learner.published

    def newest(self) -> ray.ObjectRef:
        return self._learner.newest

    def run(self, plan: Plan, theta: ray.ObjectRef) -> dict[Range, Result]:
        ahead, self._ahead = self._ahead, None
        if ahead is None or (ahead.plan, ahead.theta) != (plan, theta):
            ahead = self._sums(plan, theta, plan.ranges(len(self._free())))
        sums = self._complete_and_count(ahead)
        self.seconds = self._per_adapter(ahead)
        self.bad_episodes = ahead.receipt.bad_in_order()
        self.counters.peak_device_bytes = max(self.counters.peak_device_bytes, ahead.receipt.device_bytes)
        return self._combined(plan, theta, sums)

    def step(self, plan: Plan, theta: ray.ObjectRef, sums: dict[Range, Result]) -> dict[str, float]:
        while True:
            references = {span: result.reference for span, result in sums.items()}
            report, newest = self._learner.step(plan, references)
            if plan.step + 1 < self._num_steps:
                following = dataclasses.replace(plan, step=plan.step + 1)
                theta_then = self._learner.published_after(newest)
                self._ahead = self._sums(following, theta_then, following.ranges(len(self._free())), ahead=True)
                self._ahead.hand_out(self._free())
            try:
                metrics, seconds = self._learner.ask(report)
            except SumsLost as error:
                self._ahead = None
                sums = self._combined(plan, theta, self._with_again(plan, theta, sums, *error.args))
            else:
                self._learner.accept(newest)
                self.seconds += seconds
                return metrics

    def evaluate(
        self, plan: Plan, theta: ray.ObjectRef, inner_steps: int, policies: list[BatchNormPolicy]
    ) -> EpisodeScores:
        def submit(actor: Any, span: Range) -> tuple[ray.ObjectRef, ray.ObjectRef]:
            call: tuple[ray.ObjectRef, ray.ObjectRef] = actor.score_range.options(num_returns=2).remote(
                plan, span, theta, inner_steps, policies
            )
            return call

        scores: dict[Range, EpisodeScores] = {}
        # Four ranges an adapter: short enough to share the work evenly, long enough to outweigh the calls.
        missing = plan.ranges(4 * len(self._free()))
        while missing:
            found = self._complete_and_count(
                Work(plan, theta, Ledger("evaluation", missing), submit, self._paces["scores"])
            )
            missing = []
            for span, result in found.items():
                try:
                    scores[span] = ray.get(result.reference)
                except ObjectLostError:
                    missing.append(span)
        parts = [scores[span] for span in sorted(scores)]
        return EpisodeScores(*(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)))

    def state(self) -> LearnerState:
        return self._learner.state()

    def replace_learner(self, state: LearnerState | None) -> None:
        self._ahead = None
        self._learner.replace(state)

    def close(self) -> None:
        idle = self._free() if self._in_order and self._ahead is None else []
        slots, self._slots, self._ahead, self._overdue = self._slots, [], None, {}
        for slot in slots:
            if slot in idle and slot.successor is None:
                kept_actors.leave(AdapterActor, slot.actor, self._scaling)
            else:
                ray.kill(slot.actor)
        self._learner.close(is_idle=bool(idle))
        disconnect, self._disconnect = self._disconnect, lambda: None
        disconnect()

    def _sums(self, plan: Plan, theta: ray.ObjectRef, ranges: list[Range], ahead: bool = False) -> Work:
        def submit(actor: Any, span: Range) -> tuple[ray.ObjectRef, ray.ObjectRef]:
            if ahead:
                # While theta is still with the learner. What goes wrong here goes wrong again below, and is seen there.
                actor.sample_ahead.options(num_returns=0).remote(plan, span)
            call: tuple[ray.ObjectRef, ray.ObjectRef] = actor.sum_range.options(num_returns=2).remote(plan, span, theta)
            return call

        return Work(plan, theta, Ledger(f"step {plan.step}", ranges), submit, self._paces["sums"])

    def _combined(self, plan: Plan, theta: ray.ObjectRef, sums: dict[Range, Result]) -> dict[Range, Result]:
        """The sums, added up by adapters level by level until they are few enough for the learner."""
        while len(sums) > 1 and len(sums) * self._bytes_a_sum > combining.LEARNER_TAKES_BYTES:
            groups = combining.next_level(plan, {span: result.node for span, result in sums.items()})
            work = combining.combination(plan, theta, groups, sums, self._paces["combining"])
            found = self._complete(work)
            self.seconds += self._per_adapter(work)
            rest = {part: sums[part] for span, parts in groups.items() if span not in found for part in parts}
            sums = found | rest
            if work.lost:
                sums = self._with_again(plan, theta, sums, list(work.lost))
        return sums

    def _with_again(
        self, plan: Plan, theta: ray.ObjectRef, sums: dict[Range, Result], lost: list[Range]
    ) -> dict[Range, Result]:
        """Sums of which some were lost: these are computed again, in ranges as they are handed out."""
        self.counters.chunks_recomputed += sum(span.stop - span.start for span in lost)
        missing = combining.as_handed_out(lost, plan.ranges(len(self._free())))
        kept = {span: result for span, result in sums.items() if span not in lost}
        return kept | self._complete_and_count(self._sums(plan, theta, missing))

    def _per_adapter(self, work: Work) -> Seconds:
        adapters = max(1, self.num_adapters)
        return Seconds(*(total / adapters for total in work.receipt.seconds))

    def _complete_and_count(self, work: Work) -> dict[Range, Result]:
        """As `_complete`, for work whose chunks count where they are computed again or twice."""
        results = self._complete(work)
        self.counters.chunks_recomputed += work.ledger.chunks_lost
        self.counters.chunks_given_twice += work.chunks_given_twice
        return results

    def _complete(self, work: Work) -> dict[Range, Result]:
        """Hands out the ranges until all are done or given up; gives where each result lies.

        Calls left over from a plan that was given up only come first in their actors' queues.
        """
        ledger, calls = work.ledger, work.calls
        idle_since = time.monotonic()
        self._in_order = False
        work.begin()
        while not ledger.complete:
            work.hand_out(self._free())
            self._give_up_hung(work)
            self._leave_draining_nodes()
            idle_since = time.monotonic() if calls else idle_since
            self._give_up_if(not calls and time.monotonic() - idle_since > self._scaling.start_timeout_s, 1)
            if not calls and self._stop():
                raise InterruptedRun("interrupted while no adapter was alive")
            starting = {slot.starting: slot for slot in self._slots if slot.starting is not None}
            waiting = [*calls, *starting, *self._overdue]
            for reference in ready(waiting, POLL_S):
                if reference in starting:
                    self._admit(starting[reference])
                    continue
                if reference in self._overdue:
                    self._come_back(reference)
                    continue
                call = calls.pop(reference)
                try:
                    receipt = ray.get(reference)
                except DEATHS:
                    work.died(call)
                    self._replace(call.slot, call.actor)
                except ObjectLostError as error:
                    # Only the published theta is passed in; the learner can publish it again.
                    raise LearnerLostError(f"the published theta was lost: {first_line(error)}") from None
                except RayTaskError as error:
                    cause = cause_of(error)
                    if isinstance(cause, SumsLost):
                        work.missed(call, *cause.args)
                    else:
                        ledger.failed(call.span, cause)
                else:
                    work.done(call, receipt)
        self._overdue |= calls
        self._in_order = True
        return work.results

    def _free(self) -> list[Slot]:
        """Adapters that are ready and owe nothing from an earlier plan."""
        owing = {call.slot for call in self._overdue.values()}
        return [slot for slot in self._slots if slot.starting is None and slot not in owing]

    def _come_back(self, reference: ray.ObjectRef) -> None:
        """A call that another adapter has answered comes to its end: its result is dropped, its adapter is free."""
        call = self._overdue.pop(reference)
        try:
            ray.get(reference)
        except DEATHS:
            self._replace(call.slot, call.actor)
        except RayError:
            pass  # The other adapter's answer stands, whatever became of this one.

    def _give_up_hung(self, work: Work) -> None:
        """Kills adapters that stay silent long after another has answered, or where nobody else is there to answer."""
        now, timeout = time.monotonic(), self._scaling.hung_timeout_s
        if now - self._looked < POLL_S:
            return
        self._looked = now
        for reference, call in [*work.calls.items(), *self._overdue.items()]:
            if call.answered_elsewhere is not None:
                silent = now - call.answered_elsewhere > timeout
            else:
                allowed = work.deadline_s(call.span) + max(timeout, self._scaling.start_timeout_s)
                silent = work.pace.is_known and now - call.since > allowed
            # Where this process was held up itself, the answer may have been there for long.
            if silent and not call.given_up and not ready([reference], 0):
                call.given_up = True
                self._notify(f"An adapter has been silent for {now - call.since:.0f} s: it is ended and replaced.")
                # Its calls then come to their end as those of any other dead one.
                ray.kill(call.actor)

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

    def _new_slot(self) -> Slot:
        actor: Any = kept_actors.take(AdapterActor)
        if actor is None:
            actor = ray.remote(AdapterActor).options(**adapter_options(self._scaling)).remote()
        return Slot(actor, actor.prepare.remote(self._experiment))

    def _admit(self, slot: Slot) -> None:
        """A starting adapter has answered: takes it in, replaces it if it died, refuses it if its bits differ."""
        assert slot.starting is not None
        try:
            fingerprint, node = ray.get(slot.starting)
        except DEATHS as error:
            slot.failed_starts += 1
            if slot.failed_starts >= MAX_FAILED_STARTS:
                raise AdapterError(
                    f"{slot.failed_starts} adapters in a row died while starting: {first_line(error)}."
                    " Look into the worker logs of the Ray session (often: out of memory)."
                ) from None
            self._replace(slot, slot.actor)
            return
        except RayTaskError as error:
            raise cause_of(error) from None
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
        slot.starting, slot.failed_starts, slot.node = None, 0, node
        for old in [old for old in self._slots if old.successor is slot]:
            self._slots.remove(old)
            # Its calls come first in its queue, and are awaited as any other.
            old.actor.__ray_terminate__.remote()

    def _leave_draining_nodes(self) -> None:
        """Asks for an adapter elsewhere for each that is on a node about to be taken away; it works on meanwhile."""
        draining = self._draining.news()
        for slot in [slot for slot in self._slots if slot.node in draining and slot.successor is None]:
            self._notify(f"Node {slot.node} is about to be taken away: its adapter moves.")
            slot.successor = self._new_slot()
            self._slots.append(slot.successor)

    def _replace(self, slot: Slot, dead: Any) -> None:
        """Starts another actor in a slot, unless that has been done since `dead` was there, or elsewhere."""
        if slot.actor is not dead or slot not in self._slots:
            return
        self.counters.adapters_lost += 1
        if slot.successor is not None:
            self._slots.remove(slot)
            return
        fresh = self._new_slot()
        slot.actor, slot.starting, slot.node = fresh.actor, fresh.starting, None
