"""What an adapter tells the driver about a range, beside the sums that go to the learner."""

from typing import NamedTuple

from metadist.core.bad_episode import BadEpisode
from metadist.distributed.seconds import Seconds


class Receipt(NamedTuple):
    """Small, whatever the size of theta."""

    seconds: Seconds = Seconds()
    bad: tuple[BadEpisode, ...] = ()
    """Left out of the sums."""
    device_bytes: int = 0
    """The most GPU memory that the adapter's tensors have taken so far; 0 on a CPU."""

    def __add__(self, other: "Receipt") -> "Receipt":  # type: ignore[override]
        return Receipt(self.seconds + other.seconds, self.bad + other.bad, max(self.device_bytes, other.device_bytes))

    def bad_in_order(self) -> list[BadEpisode]:
        """By task, each once: a range that was computed a second time names its own again."""
        return sorted({episode.key: episode for episode in self.bad}.values())
