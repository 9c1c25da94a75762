"""A plan under way on Ray: which adapter has which call, which calls are late, and where results lie."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from metadist.core.plan import Plan, Range
from metadist.distributed.ledger import Ledger
from metadist.distributed.pace import Pace
from metadist.distributed.receipt import Receipt

LOOK_EVERY_S = 0.1
"""A step has as many turns as ranges, and each of them need not look at all calls."""


@dataclass(eq=False)
class Slot:
    """A place for one adapter: starting until its fingerprint is there, then ready until its actor dies."""

    actor: Any
    starting: ray.ObjectRef | None
    failed_starts: int = 0
    node: str | None = None
    """Id of the node that it is on, once it is ready."""
    successor: "Slot | None" = None
    """What will take its place as soon as it is ready, since its node is about to be taken away."""


class Result(NamedTuple):
    """What an adapter has made of a range."""

    reference: ray.ObjectRef
    node: str | None
    """Id of the node that it lies on."""


@dataclass(eq=False)
class Call:
    """One range with one adapter; a slot may have another actor by the time that the call comes to its end."""

    slot: Slot
    actor: Any
    span: Range
    result: Result
    since: float = field(default_factory=time.monotonic)
    answered_elsewhere: float | None = None
    """When another adapter gave the same range."""
    given_up: bool = False


@dataclass(eq=False)
class Work:
    """A plan's ledger, the calls that are out, by their receipts, and the results so far."""

    plan: Plan
    theta: ray.ObjectRef
    ledger: Ledger
    submit: Callable[[Any, Range], tuple[ray.ObjectRef, ray.ObjectRef]]
    pace: Pace
    calls: dict[ray.ObjectRef, Call] = field(default_factory=dict)
    results: dict[Range, Result] = field(default_factory=dict)
    receipt: Receipt = field(default_factory=Receipt)
    """Of all adapters together."""
    homes: Mapping[Range, str | None] = field(default_factory=dict)
    """Nodes on which a range is best worked on; those that are left out may go anywhere."""
    chunks_given_twice: int = 0
    _looked: float = 0.0

    def begin(self) -> None:
        """Theta is there: calls that were made before wait for nothing else from now on."""
        for call in self.calls.values():
            call.since = time.monotonic()

    def hand_out(self, free: Iterable[Slot]) -> None:
        """Gives every free slot without a range of this plan the next one that is open, or else one that is late."""
        busy = {call.slot for call in self.calls.values()}
        late = self._late()
        for slot in self._nearest([slot for slot in free if slot not in busy]):
            span = self.ledger.submit(slot.actor)
            if span is None:
                if not late:
                    return
                span = late.pop(0)
                self.ledger.submit_again(span, slot.actor)
                self.chunks_given_twice += span.stop - span.start
            receipt, result = self.submit(slot.actor, span)
            self.calls[receipt] = Call(slot, slot.actor, span, Result(result, slot.node))

    def _nearest(self, idle: list[Slot]) -> list[Slot]:
        """In the order of the open ranges: for each an adapter at its home if there is one, else the next one."""
        if not self.homes:
            return idle
        chosen: list[Slot] = []
        for span in list(self.ledger.open)[: len(idle)]:
            home = self.homes.get(span)
            slot = next((slot for slot in idle if slot.node == home), idle[0])
            idle.remove(slot)
            chosen.append(slot)
        return chosen + idle

    def done(self, call: Call, receipt: Receipt) -> None:
        """Takes the first answer for a range, and drops any other."""
        if not self.ledger.done(call.span):
            return
        self.results[call.span] = call.result
        self.receipt += receipt
        self.pace.note(call.span, sum(receipt.seconds))
        for other in self.calls.values():
            if other.span == call.span:
                other.answered_elsewhere = time.monotonic()

    def _late(self) -> list[Range]:
        """Ranges whose last call is out for too long, the longest first; looked for every LOOK_EVERY_S."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return []
        self._looked = now
        # When each range that is out was given to somebody for the last time.
        given = {call.span: call.since for call in sorted(self.calls.values(), key=lambda call: call.since)}
        late = [span for span, since in given.items() if now - since > self.pace.deadline_s(span)]
        return [span for span in late if self.ledger.is_out(span)]
