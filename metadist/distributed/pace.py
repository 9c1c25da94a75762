"""How long a call may take, drawn from the run's own chunk times."""

from collections import deque

HISTORY = 64
"""Calls that are remembered."""
ENOUGH = 8
"""Calls that it takes to know the pace."""
FACTOR = 8.0
FLOOR_S = 0.5
"""Shorter waits are those of a busy machine."""


class Pace:
    """A call is late after FACTOR times the lower quartile of the last calls' seconds a chunk, and FLOOR_S at least.

    The lower quartile, since of two adapters a slow one makes half of the calls; and only calls that were answered
    first are noted. Where all adapters become slower, they are the ones that answer first, and the pace follows.
    """

    def __init__(self, unknown_s: float) -> None:
        self._unknown_s = unknown_s
        self._seconds_a_chunk: deque[float] = deque(maxlen=HISTORY)
        self._quartile: float | None = None

    @property
    def is_known(self) -> bool:
        return len(self._seconds_a_chunk) >= ENOUGH

    def note(self, chunks: int, seconds: float) -> None:
        """A call for so many chunks took an adapter so long."""
        self._seconds_a_chunk.append(seconds / chunks)
        self._quartile = None

    def deadline_s(self, chunks: int) -> float:
        """How long a call for so many chunks may take until it is late; `unknown_s` before the pace is known."""
        if not self.is_known:
            return self._unknown_s
        if self._quartile is None:
            self._quartile = sorted(self._seconds_a_chunk)[len(self._seconds_a_chunk) // 4]
        return max(FLOOR_S, FACTOR * self._quartile * chunks)
