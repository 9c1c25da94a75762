"""N-way k-shot classification over a class pool, for images and for vectors."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field

from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
from metadist.core.keys import TaskKey, generator
from metadist.core.settings import settings
from metadist.errors import DataError
from metadist.tasks.class_pool import ClassPool, read_pool

Count = Annotated[int, Field(ge=1)]
Ways = Annotated[int, Field(ge=2)]


class Sizes(NamedTuple):
    """Of one episode: classes, and support and query examples a class."""

    ways: int
    shots: int
    queries: int


class EpisodeClass(NamedTuple):
    """One class of an episode."""

    name: str
    superclass: str | None
    turn: int
    """Quarter turns of its images."""


class _Drawn(NamedTuple):
    """What an episode takes of one class."""

    class_id: int
    turn: int
    examples: np.ndarray
    """int64 `[shots + queries]`: where they lie in the pool."""


@settings
class FewShot:
    """N-way k-shot episodes (Vinyals et al. 2016, arXiv:1606.04080, sec. 4.1).

    An episode draws `ways` classes of its split without replacement, numbers them in random order, and
    draws `shots + queries` examples of each without replacement. Images are given as value / 255.
    """

    pool: str
    """Path or URI of a class pool."""
    ways: Ways = 5
    shots: Count = 1
    """Support examples a class."""
    queries: Count = 1
    """Query examples a class."""
    train_ways: Ways | None = None
    """Ways of training episodes where they are others than at test (60 for Snell et al. 2017, arXiv:1703.05175)."""
    train_shots: Count | None = None
    """Support examples a class in training episodes; left out, `shots`."""
    train_queries: Count | None = None
    """Query examples a class in training episodes; left out, `queries`."""
    rotate_classes: bool = False
    """Each image class turned by 90, 180 and 270 degrees is three more classes (Santoro et al. 2016, sec. 4.1)."""

    def sizes(self, split: str) -> Sizes:
        """Sizes of a split's episodes."""
        return Sizes(*(getattr(self, self.key(split, name)) for name in Sizes._fields))

    def key(self, split: str, name: str) -> str:
        """The setting that decides over a size (`ways`, say) of a split's episodes."""
        return f"train_{name}" if split == "train" and getattr(self, f"train_{name}") is not None else name

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
        s, sizes = self.settings, self.settings.sizes(split)
        needed = sizes.shots + sizes.queries
        smallest = ids[np.argmin(self.pool.sizes()[ids])]
        if self.pool.sizes()[smallest] < needed:
            raise DataError(
                f"{self.pool.path}: class {self.pool.classes[smallest]!r} ({split}) has"
                f" {self.pool.sizes()[smallest]} examples, and task.{s.key(split, 'shots')} +"
                f" task.{s.key(split, 'queries')} = {sizes.shots} + {sizes.queries} = {needed} are needed."
                " Lower them, or leave that class out of the pool."
            )

    @property
    def spec(self) -> EpisodeSpec:
        return self._spec("test")

    @property
    def train_spec(self) -> EpisodeSpec:
        return self._spec("train")

    def _spec(self, split: str) -> EpisodeSpec:
        sizes = self.settings.sizes(split)
        return EpisodeSpec(
            kind="classification",
            input_shape=self.pool.examples.shape[1:],
            output_size=sizes.ways,
            support_size=sizes.ways * sizes.shots,
            query_size=sizes.ways * sizes.queries,
        )

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        # Episodes of one batch have one shape, so its keys are of splits that have the same.
        (sizes,) = {self.settings.sizes(key.split) for key in keys}
        episodes = np.stack([self._draw(key, sizes) for key in keys])
        if self.pool.is_images:
            episodes = episodes.astype(np.float32) / np.float32(255)
        labels = torch.arange(sizes.ways).repeat(len(keys), 1)

        def examples(part: np.ndarray, number: int) -> Examples:
            x = torch.from_numpy(np.ascontiguousarray(part))
            return Examples(x.flatten(1, 2), labels.repeat_interleave(number, dim=1))

        return EpisodeBatch(
            examples(episodes[:, :, : sizes.shots], sizes.shots), examples(episodes[:, :, sizes.shots :], sizes.queries)
        )

    def classes_of(self, key: TaskKey) -> list[EpisodeClass]:
        """The classes of one episode, in the order of their labels."""
        drawn = self._choose(key, self.settings.sizes(key.split))
        return [EpisodeClass(self.pool.classes[c.class_id], self.pool.superclasses[c.class_id], c.turn) for c in drawn]

    def family_of(self, key: TaskKey) -> str | None:
        """The superclass that all classes of an episode share; None where there is none."""
        (family, *others) = {each.superclass for each in self.classes_of(key)}
        return None if others else family

    def _draw(self, key: TaskKey, sizes: Sizes) -> np.ndarray:
        """The examples of one episode, `[ways, shots + queries, *input_shape]`."""
        examples = self.pool.examples
        return np.stack(
            [
                np.rot90(examples[c.examples], c.turn, axes=(-2, -1)) if c.turn else examples[c.examples]
                for c in self._choose(key, sizes)
            ]
        )

    def _choose(self, key: TaskKey, sizes: Sizes) -> list[_Drawn]:
        s, pool, random = self.settings, self.pool, generator(key)
        turns = 4 if s.rotate_classes else 1
        ids = pool.class_ids[key.split]
        if len(ids) * turns < sizes.ways:
            ways = f"task.{s.key(key.split, 'ways')}"
            raise DataError(
                f"{pool.path}: {ways} = {sizes.ways} is more than the {len(ids) * turns} classes of split"
                f" {key.split!r}. Lower {ways}, or move classes to that split."
            )
        drawn = []
        for number in random.choice(len(ids) * turns, sizes.ways, replace=False):
            class_id, turn = ids[number // turns], number % turns
            start, stop = pool.starts[class_id], pool.starts[class_id + 1]
            chosen = start + random.choice(stop - start, sizes.shots + sizes.queries, replace=False)
            drawn.append(_Drawn(int(class_id), int(turn), chosen))
        return drawn
