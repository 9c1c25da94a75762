"""A plan under way on Ray: which adapter has which call, which calls are late, and where results lie."""

import time
from collections import Counter
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
    sizes: Mapping[Range, int] = field(default_factory=dict)
    """What the time that a range takes goes by, where that is not its number of chunks."""
    lost: set[Range] = field(default_factory=set)
    """What a range needed and was gone; the range is then given up."""
    shunned: set[str | None] = field(default_factory=set)
    """Nodes on which an adapter has died: where others are free, these get what it leaves."""
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
        for slot in self._in_order([slot for slot in free if slot not in busy]):
            span = self.ledger.submit(slot.actor)
            if span is None:
                if not late:
                    return
                span = late.pop(0)
                self.ledger.submit_again(span, slot.actor)
                self.chunks_given_twice += span.stop - span.start
            receipt, result = self.submit(slot.actor, span)
            self.calls[receipt] = Call(slot, slot.actor, span, Result(result, slot.node))

    def _in_order(self, idle: list[Slot]) -> list[Slot]:
        """In the order of the open ranges: for each an adapter at its home, else one of a node that has lost none.

        Ranges without a home go to as many adapters of each node as of any other, neighbouring ones to one node.
        """
        idle = sorted(idle, key=lambda slot: slot.node in self.shunned)
        if not self.homes:
            return idle if self.shunned else _evenly(idle, len(self.ledger.open))
        chosen: list[Slot] = []
        for span in list(self.ledger.open)[: len(idle)]:
            home = self.homes.get(span)
            at_home = (slot for slot in idle if slot.node == home and home not in self.shunned)
            slot = next(at_home, idle[0])
            idle.remove(slot)
            chosen.append(slot)
        return chosen + idle

    def died(self, call: Call) -> None:
        """The call's adapter is dead: all that it had and no other one has is open again."""
        self.ledger.lost(call.actor)
        self.shunned.add(call.result.node)

    def missed(self, call: Call, lost: Iterable[Range]) -> None:
        """What the call's range is made of is gone in part: the range is given up, unless somebody has made it."""
        if self.ledger.done(call.span):
            self.lost.update(lost)

    def done(self, call: Call, receipt: Receipt) -> None:
        """Takes the first answer for a range, and drops any other."""
        if not self.ledger.done(call.span):
            return
        self.results[call.span] = call.result
        self.receipt += receipt
        self.pace.note(self._size(call.span), sum(receipt.seconds))
        for other in self.calls.values():
            if other.span == call.span:
                other.answered_elsewhere = time.monotonic()

    def deadline_s(self, span: Range) -> float:
        """How long a call for a range may take until it is late."""
        return self.pace.deadline_s(self._size(span))

    def _size(self, span: Range) -> int:
        return self.sizes.get(span, span.stop - span.start)

    def _late(self) -> list[Range]:
        """Ranges whose last call is out for too long, the longest first; looked for every LOOK_EVERY_S."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return []
        self._looked = now
        # When each range that is out was given to somebody for the last time.
        given = {call.span: call.since for call in sorted(self.calls.values(), key=lambda call: call.since)}
        late = [span for span, since in given.items() if now - since > self.deadline_s(span)]
        return [span for span in late if self.ledger.is_out(span)]


def _evenly(idle: list[Slot], wanted: int) -> list[Slot]:
    """First `wanted` of them, as many of each node as of any other and those of a node together; then the rest."""
    seen: Counter[str | None] = Counter()
    turns = []
    for slot in idle:
        turns.append(seen[slot.node])
        seen[slot.node] += 1
    ranked = [slot for _, slot in sorted(zip(turns, idle, strict=True), key=lambda pair: pair[0])]
    return sorted(ranked[:wanted], key=lambda slot: slot.node or "") + ranked[wanted:]


def ready(waiting: list[ray.ObjectRef], timeout_s: float) -> list[ray.ObjectRef]:
    """All answers that are there by the time that one of them is: none where that takes longer."""
    first, rest = ray.wait(waiting, num_returns=1, timeout=timeout_s)
    if not first or not rest:
        return first
    more, _ = ray.wait(rest, num_returns=len(rest), timeout=0)
    return first + more
