"""Task keys: the only source of randomness while training and evaluating.

A key names one task of one run. What is drawn for it depends on the key alone, never on who draws
it, when, or what was drawn before; so no generator state is ever saved, and any process can
recompute any episode.
"""

from typing import NamedTuple

import numpy as np

SPLITS = ("train", "val", "test")


class TaskKey(NamedTuple):
    """Names one task: the run's seed, the split, the step (0 in evaluation), the task's index in the meta-batch."""

    run_seed: int
    split: str
    step: int
    task: int

    def __str__(self) -> str:
        return f"{self.split}/seed={self.run_seed}/step={self.step}/task={self.task}"


def generator(key: TaskKey) -> np.random.Generator:
    """The random numbers of one task: Philox4x64-10 (Salmon et al. 2011), a counter-based generator.

    Run seed and split are the cipher's key; task and step are the two high words of its 256-bit
    counter, so each task owns 2**128 blocks that no other task reaches.
    """
    return np.random.Generator(_philox(key, 0))


def seed_for_layers(key: TaskKey) -> int:
    """A seed for layers that draw random numbers (dropout): from the upper half of the task's blocks."""
    return int(np.random.Generator(_philox(key, 2**63)).integers(2**63))


def _philox(key: TaskKey, first_block: int) -> np.random.Philox:
    return np.random.Philox(
        key=np.array([key.run_seed, SPLITS.index(key.split)], dtype=np.uint64),
        counter=np.array([0, first_block, key.task, key.step], dtype=np.uint64),
    )
