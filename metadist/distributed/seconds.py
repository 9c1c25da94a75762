"""What the parts of a step took."""

from typing import NamedTuple


class Seconds(NamedTuple):
    """Where the time of one step went; the rest of its wall-clock time is waiting and moving data."""

    sampling: float = 0.0
    """Mean over the adapters."""
    adapting: float = 0.0
    """Mean over the adapters: inner loops and meta-gradients."""
    reducing: float = 0.0
    """The learner's sums over ranges, and the mean over the adapters of what they combine for it, fetching included."""
    stepping: float = 0.0
    """The learner's clipping and optimizer."""

    def __add__(self, other: "Seconds") -> "Seconds":  # type: ignore[override]
        return Seconds(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))
