"""The ledger of one plan: which ranges of chunks are open, with whom, and done. Only lost ones are done again."""

from collections import deque
from collections.abc import Collection, Hashable, Iterable

from metadist.core.plan import Range
from metadist.errors import AdapterError

MAX_CRASHES = 5
"""Adapters that one range may bring down before it is taken to be the cause."""


class Ledger:
    """Keeps account of ranges by their state: open -> submitted -> done, and back to open when lost."""

    def __init__(self, name: str, ranges: Iterable[Range], *, divisible: bool = True) -> None:
        self.name = name
        """What the plan is, for errors: "step 812"."""
        self._divisible = divisible
        """Whether a range that raises can be done chunk by chunk."""
        self._open = deque(ranges)
        self._submitted: dict[Range, list[Hashable]] = {}
        self._done: set[Range] = set()
        self._errors: dict[Range, str] = {}
        self._errors_before: dict[Range, str] = {}
        """Of the range that a chunk was in."""
        self._divided: set[Range] = set()
        self._crashes: dict[Range, int] = {}
        self._total = len(self._open)
        self.chunks_lost = 0

    @property
    def complete(self) -> bool:
        return len(self._done) == self._total

    @property
    def open(self) -> Collection[Range]:
        """Ranges that `submit` will give next, in that order."""
        return self._open

    def submit(self, adapter: Hashable) -> Range | None:
        """The next open range, now with `adapter`; None where no range is open."""
        if not self._open:
            return None
        span = self._open.popleft()
        self._submitted[span] = [adapter]
        return span

    def is_out(self, span: Range) -> bool:
        """Whether an adapter has the range."""
        return span in self._submitted

    def submit_again(self, span: Range, adapter: Hashable) -> None:
        """A range that is late with one adapter is now with `adapter` too."""
        self._submitted.setdefault(span, []).append(adapter)

    def done(self, span: Range) -> bool:
        """Notes a result; False for one that is to be dropped: a duplicate, or one whose chunks are done one by one."""
        self._submitted.pop(span, None)
        if span in self._done or span in self._divided:
            return False
        if span in self._open:  # It was given up for lost, and its result came after all.
            self._open.remove(span)
        self._done.add(span)
        return True

    def lost(self, adapter: Hashable) -> list[Range]:
        """Opens again, first in line, all that a dead adapter had not finished and no other one has.

        Raises AdapterError where a range has brought down `MAX_CRASHES` adapters.
        """
        lost = []
        for span, holders in list(self._submitted.items()):
            if adapter not in holders:
                continue
            holders.remove(adapter)
            self._crashes[span] = self._crashes.get(span, 0) + 1
            if self._crashes[span] == MAX_CRASHES:
                raise AdapterError(
                    f"{self.name}: {MAX_CRASHES} adapters died while they computed chunks {span.start} to"
                    f" {span.stop - 1}. Often that is too little memory: lower training.chunk_size, or see the worker"
                    " logs of the Ray session."
                )
            if not holders:
                self._reopen(span)
                lost.append(span)
        return lost

    def failed(self, span: Range, error: Exception) -> None:
        """Notes that a range raised: each of its chunks gets one more chance, alone, and the same error twice stops.

        A range that cannot be divided gets its chance whole.
        The error of a duplicate whose range is done or was divided already is dropped with it.
        """
        if span in self._done or span in self._divided:
            return
        message = str(error)
        if message in (self._errors.get(span), self._errors_before.get(span)):
            raise error
        if span in self._errors:
            raise AdapterError(
                f"{self.name}: chunks {span.start} to {span.stop - 1} failed twice: {message}"
            ) from error
        if span.stop - span.start == 1 or not self._divisible:
            self._errors[span] = message
            self._reopen(span)
            return
        # Two chunks that raise once each are two accidents, and no range that raises twice.
        self._divided.add(span)
        self._submitted.pop(span, None)
        chunks = [Range(chunk, chunk + 1) for chunk in range(span.start, span.stop)]
        self._errors_before |= dict.fromkeys(chunks, message)
        self._open.extendleft(reversed(chunks))
        self._total += len(chunks) - 1
        self.chunks_lost += len(chunks)

    def _reopen(self, span: Range) -> None:
        self._submitted.pop(span, None)
        self._open.appendleft(span)
        self.chunks_lost += span.stop - span.start
