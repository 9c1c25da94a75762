"""Episodes that cannot be learned from: what is recorded of one that a step leaves out."""

from typing import NamedTuple

from metadist.core.keys import TaskKey


class BadEpisode(NamedTuple):
    """A task whose sampling or adapting raised, or whose loss or meta-gradient is NaN or infinite."""

    key: TaskKey
    chunk: int
    source: str
    """The task source's class."""
    reason: str
