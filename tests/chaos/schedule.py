"""Which faults a run meets, and after which step: drawn from a seed, so that a schedule can be run again."""

import itertools
from collections import deque

import numpy as np

KINDS = {
    "adapter killed": 22,
    "adapter hung": 8,
    "adapter stalled": 8,
    "node removed": 8,
    "node added": 8,
    "learner killed": 6,
    "storage fails": 4,
    "checkpoint torn": 4,
}
"""How many of 68: SIGKILL, SIGSTOP for good and for two seconds, a raylet's SIGKILL and a new one; the learner dies
within 50 ms of a step, so before, during and after its optimizer step and while a checkpoint is written."""


def schedule(seed: int, steps: int, faults: int, checkpoint_every: int) -> deque[tuple[int, str]]:
    """`faults` faults of a run of `steps`, by step, in the proportions of KINDS."""
    random = np.random.default_rng(seed)
    total = sum(KINDS.values())
    kinds = [kind for kind, count in KINDS.items() for _ in range(round(count * faults / total))]
    random.shuffle(kinds)
    # A node goes, and another comes in its place.
    nodes = itertools.cycle(("node removed", "node added"))
    kinds = [next(nodes) if kind.startswith("node") else kind for kind in kinds]
    at = np.sort(random.integers(checkpoint_every + 1, steps - 3 * checkpoint_every, len(kinds)))
    return deque(zip(map(int, at), kinds, strict=True))
