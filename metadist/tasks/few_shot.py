"""N-way k-shot classification over a class pool, for images and for vectors."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
from metadist.core.keys import TaskKey, generator
from metadist.core.settings import settings
from metadist.errors import DataError
from metadist.tasks.class_pool import ClassPool, read_pool

Count = Annotated[int, Field(ge=1)]


@settings
class FewShot:
    """N-way k-shot episodes (Vinyals et al. 2016, arXiv:1606.04080, sec. 4.1).

    An episode draws `ways` classes of its split without replacement, numbers them in random order, and
    draws `shots + queries` examples of each without replacement. Images are given as value / 255.
    """

    pool: str
    """Path or URI of a class pool."""
    ways: Annotated[int, Field(ge=2)] = 5
    shots: Count = 1
    """Support examples a class."""
    queries: Count = 1
    """Query examples a class."""
    rotate_classes: bool = False
    """Each image class turned by 90, 180 and 270 degrees is three more classes (Santoro et al. 2016, sec. 4.1)."""

    def open(self) -> "FewShotSource":
        return FewShotSource(self, read_pool(self.pool))


class FewShotSource:
    """Episodes of one pool. Its arrays are never written to: adapters of one node share them."""

    def __init__(self, settings: FewShot, pool: ClassPool) -> None:
        self.settings = settings
        self.pool = pool
        shape = pool.examples.shape[1:]
        if settings.rotate_classes and (not pool.is_images or shape[1] != shape[2]):
            raise DataError(
                f"{pool.path}: task.rotate_classes needs square images, got"
                f" {f'{shape[2]} x {shape[1]} pixels' if pool.is_images else 'vectors'}. Set it to false."
            )
        for split, ids in pool.class_ids.items():
            if len(ids):
                self._check_class_sizes(split, ids)

    def _check_class_sizes(self, split: str, ids: np.ndarray) -> None:
        needed = self.settings.shots + self.settings.queries
        smallest = ids[np.argmin(self.pool.sizes()[ids])]
        if self.pool.sizes()[smallest] < needed:
            raise DataError(
                f"{self.pool.path}: class {self.pool.classes[smallest]!r} ({split}) has"
                f" {self.pool.sizes()[smallest]} examples, and task.shots + task.queries ="
                f" {self.settings.shots} + {self.settings.queries} = {needed} are needed."
                " Lower them, or leave that class out of the pool."
            )

    @property
    def spec(self) -> EpisodeSpec:
        s = self.settings
        return EpisodeSpec(
            kind="classification",
            input_shape=self.pool.examples.shape[1:],
            output_size=s.ways,
            support_size=s.ways * s.shots,
            query_size=s.ways * s.queries,
        )

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        s = self.settings
        episodes = np.stack([self._draw(key) for key in keys])
        if self.pool.is_images:
            episodes = episodes.astype(np.float32) / np.float32(255)
        labels = torch.arange(s.ways).repeat(len(keys), 1)

        def examples(part: np.ndarray, number: int) -> Examples:
            x = torch.from_numpy(np.ascontiguousarray(part))
            return Examples(x.flatten(1, 2), labels.repeat_interleave(number, dim=1))

        return EpisodeBatch(
            examples(episodes[:, :, : s.shots], s.shots), examples(episodes[:, :, s.shots :], s.queries)
        )

    def _draw(self, key: TaskKey) -> np.ndarray:
        """The examples of one episode, `[ways, shots + queries, *input_shape]`."""
        s, pool, random = self.settings, self.pool, generator(key)
        turns = 4 if s.rotate_classes else 1
        ids = pool.class_ids[key.split]
        if len(ids) * turns < s.ways:
            raise DataError(
                f"{pool.path}: task.ways = {s.ways} is more than the {len(ids) * turns} classes of split"
                f" {key.split!r}. Lower task.ways, or move classes to that split."
            )
        drawn = []
        for number in random.choice(len(ids) * turns, s.ways, replace=False):
            class_id, turn = ids[number // turns], number % turns
            start, stop = pool.starts[class_id], pool.starts[class_id + 1]
            chosen = start + random.choice(stop - start, s.shots + s.queries, replace=False)
            drawn.append(np.rot90(pool.examples[chosen], turn, axes=(-2, -1)) if turn else pool.examples[chosen])
        return np.stack(drawn)
