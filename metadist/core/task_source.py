"""The interface of every task source: it makes the episodes of given keys."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.keys import TaskKey


@runtime_checkable
class TaskSource(Protocol):
    """A distribution over tasks, as a pure function of task keys."""

    @property
    def spec(self) -> EpisodeSpec:
        """The fixed shape of every episode."""

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        """One episode a key, stacked. The same key gives the same episode on any machine.

        Draw from `metadist.generator(key)` alone. Hold big data as NumPy arrays: adapters on one
        node share them, read-only.
        """
