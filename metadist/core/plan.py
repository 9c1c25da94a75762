"""What one meta-iteration computes: chunks of task keys, and the aligned ranges of chunks that are handed out."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from metadist.core.keys import TaskKey


class Range(NamedTuple):
    """Chunks `start .. stop - 1`. Aligned: `start` is a multiple of the power of two that spans the range."""

    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """The tasks of one step (or of one evaluation), cut into chunks of one fixed size.

    A plan depends on the run alone, never on how many adapters there are: the chunk is the unit of
    computation, so the same chunks give the same bits wherever they are computed.
    """

    run_seed: int
    split: str
    step: int
    num_tasks: int
    chunk_size: int

    @property
    def num_chunks(self) -> int:
        return -(-self.num_tasks // self.chunk_size)

    def keys(self, chunk: int) -> list[TaskKey]:
        """The chunk's task keys, always `chunk_size` of them: a short last chunk goes on with valid tasks."""
        first = chunk * self.chunk_size
        return [TaskKey(self.run_seed, self.split, self.step, first + i) for i in range(self.chunk_size)]

    def weights(self, chunk: int) -> np.ndarray:
        """float32 `[chunk_size]`: 1 for the plan's tasks, 0 for those that only fill the last chunk."""
        tasks = chunk * self.chunk_size + np.arange(self.chunk_size)
        return (tasks < self.num_tasks).astype(np.float32)

    def ranges(self, num_workers: int) -> list[Range]:
        """Aligned ranges that cover all chunks, of the size that lets `num_workers` finish soonest.

        Larger ranges mean fewer sums to move; among sizes that finish equally soon the largest wins.
        How the chunks are cut changes no bit: see `reduction`.
        """
        workers = max(1, num_workers)
        sizes = [1 << level for level in range((self.num_chunks - 1).bit_length() + 1)]

        def time_in_chunks(size: int) -> int:
            full, rest = divmod(self.num_chunks, size)
            rounds, left = divmod(full, workers)
            # The last, short range takes no time of its own beside full ones.
            return rounds * size + (size if left else rest)

        return self.aligned(min(reversed(sizes), key=time_in_chunks))

    def aligned(self, size: int) -> list[Range]:
        """Aligned ranges of `size` chunks, a power of two, that cover all; the last one may be shorter."""
        return [Range(start, min(start + size, self.num_chunks)) for start in range(0, self.num_chunks, size)]


def plan_step(run_seed: int, step: int, meta_batch_size: int, chunk_size: int) -> Plan:
    """The plan of one outer-loop step: `meta_batch_size` training tasks."""
    return Plan(run_seed, "train", step, meta_batch_size, chunk_size)


def plan_evaluation(seed: int, split: str, episodes: int, chunk_size: int) -> Plan:
    """The plan of an evaluation: the same fixed list of episodes for the same seed and split."""
    return Plan(seed, split, 0, episodes, chunk_size)
