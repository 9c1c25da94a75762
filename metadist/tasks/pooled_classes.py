"""Plain mini-batches over all training classes of a pool at once, and few-shot episodes at test: for baselines."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
from metadist.core.keys import TaskKey, generator
from metadist.core.settings import settings
from metadist.errors import DataError
from metadist.tasks.class_pool import read_pool
from metadist.tasks.few_shot import Count, EpisodeClass, FewShot, FewShotSource, Ways


@settings
class PooledClasses:
    """Training as of an ordinary classifier (Chen et al. 2019, arXiv:1904.04232, sec. 3.1), tests as `few_shot`.

    A training "episode" has an empty support set, and its query set is a mini-batch: examples of the
    training split without replacement, labelled by class over all of it. Episodes of val and test are
    the very ones that `few_shot` gives with these settings, so that baselines meet the same ones.
    """

    pool: str
    """Path or URI of a class pool."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Examples in a training mini-batch; a step takes `training.meta_batch_size` of them."""
    ways: Ways = 5
    shots: Count = 1
    """Support examples a class, at test."""
    queries: Count = 1
    """Query examples a class, at test."""
    rotate_classes: bool = False
    """Each image class turned by 90, 180 and 270 degrees is three more classes (Santoro et al. 2016, sec. 4.1)."""

    def open(self) -> "PooledClassesSource":
        few_shot = FewShot(
            pool=self.pool,
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            rotate_classes=self.rotate_classes,
        )
        return PooledClassesSource(self, FewShotSource(few_shot, read_pool(self.pool)))


class PooledClassesSource:
    """Mini-batches of the training split beside the episodes of `few_shot`, over one pool."""

    def __init__(self, settings: PooledClasses, few_shot: FewShotSource) -> None:
        self.settings = settings
        self.few_shot = few_shot
        self.turns = 4 if settings.rotate_classes else 1
        pool, train = few_shot.pool, few_shot.pool.class_ids["train"]
        classes = np.repeat(np.arange(len(pool.classes)), pool.sizes())
        self.rows = np.flatnonzero(np.isin(classes, train))
        """int64 `[training examples]`: where each lies in the pool."""
        self.labels = np.searchsorted(train, classes[self.rows])
        """int64 `[training examples]`: its class, numbered from 0, before it is turned."""
        available = len(self.rows) * self.turns
        if available < settings.batch_size:
            raise DataError(
                f"{pool.path}: task.batch_size = {settings.batch_size} is more than the {available} examples of split"
                " 'train'. Lower it, or move classes to that split."
            )

    @property
    def spec(self) -> EpisodeSpec:
        return self.few_shot.spec

    @property
    def train_spec(self) -> EpisodeSpec:
        return dataclasses.replace(
            self.spec,
            output_size=len(self.few_shot.pool.class_ids["train"]) * self.turns,
            support_size=0,
            query_size=self.settings.batch_size,
        )

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        # Episodes of one batch have one shape.
        (training,) = {key.split == "train" for key in keys}
        if not training:
            return self.few_shot.sample(keys)
        x, y = (np.stack(part) for part in zip(*map(self._draw, keys), strict=True))
        if self.few_shot.pool.is_images:
            x = x.astype(np.float32) / np.float32(255)
        query = Examples(torch.from_numpy(x), torch.from_numpy(y))
        return EpisodeBatch(Examples(query.x[:, :0], query.y[:, :0]), query)

    def classes_of(self, key: TaskKey) -> list[EpisodeClass]:
        """The classes of one episode of val or test, in the order of their labels."""
        return self.few_shot.classes_of(key)

    def family_of(self, key: TaskKey) -> str | None:
        """As of `few_shot`."""
        return self.few_shot.family_of(key)

    def _draw(self, key: TaskKey) -> tuple[np.ndarray, np.ndarray]:
        """One mini-batch: `[batch_size, *input_shape]` and its labels."""
        turned = generator(key).choice(len(self.rows) * self.turns, self.settings.batch_size, replace=False)
        chosen, turns = turned // self.turns, turned % self.turns
        x = self.few_shot.pool.examples[self.rows[chosen]]
        for turn in range(1, self.turns):
            x[turns == turn] = np.rot90(x[turns == turn], turn, axes=(-2, -1))
        return x, self.labels[chosen] * self.turns + turns
