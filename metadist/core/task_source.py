"""The interface of every task source: it makes the episodes of given keys."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.keys import TaskKey


def spec_of(source: "TaskSource", split: str) -> EpisodeSpec:
    """The shape of a split's episodes."""
    spec: EpisodeSpec = getattr(source, "train_spec", source.spec) if split == "train" else source.spec
    return spec


@runtime_checkable
class TaskSource(Protocol):
    """A distribution over tasks, as a pure function of task keys."""

    @property
    def spec(self) -> EpisodeSpec:
        """The fixed shape of every episode.

        Where training episodes have another (more ways or shots), the source has `train_spec` beside it.
        """

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        """One episode a key, stacked. The same key gives the same episode on any machine.

        Draw from `metadist.generator(key)` alone. Hold big data as NumPy arrays: adapters on one
        node share them, read-only.
        """
