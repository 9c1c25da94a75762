"""Task sources some of whose training tasks are bad on purpose."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
from metadist.core.keys import TaskKey
from metadist.tasks.sinusoid import Sinusoid

RAISES, NAN, HUGE, NO_MEMORY = "raises", "nan", "huge", "no memory"
SOURCE = Sinusoid(shots=3, queries=4)


@dataclass(frozen=True)
class Poisoned:
    """Sinusoids; training tasks, by (step, task), raise, hold NaN, or are so large that the loss is infinite."""

    bad: dict[tuple[int, int], str] = field(default_factory=dict)
    source: Sinusoid = SOURCE

    @property
    def spec(self) -> EpisodeSpec:
        return self.source.spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        batch = self.source.sample(keys)
        factor = torch.ones(len(keys), 1, 1)
        for row, key in enumerate(keys):
            what = self.bad.get((key.step, key.task)) if key.split == "train" else None
            if what == RAISES:
                raise ZeroDivisionError("no such sinusoid")
            if what == NO_MEMORY:
                raise MemoryError
            factor[row] = {None: 1.0, NAN: float("nan"), HUGE: 1e30}[what]
        return EpisodeBatch(*(Examples(part.x, part.y * factor) for part in batch))
