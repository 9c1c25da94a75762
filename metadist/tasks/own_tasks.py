"""Tasks of one's own, a labelled set each, as episodes to learn from beside those of a run's source."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
from metadist.core.keys import TaskKey, generator
from metadist.core.task_source import TaskSource, spec_of
from metadist.errors import DataError
from metadist.tasks.few_shot import FewShotSource, Sizes
from metadist.tasks.labelled_files import LabelledExamples, read_labelled


@dataclass(frozen=True)
class OwnTask:
    """One labelled set; its episodes are drawn from it."""

    name: str
    x: np.ndarray
    """uint8 or float32 `[examples, *input_shape]`."""
    y: np.ndarray
    """`[examples]` labels, or float32 `[examples, targets]` in regression."""

    @property
    def class_sizes(self) -> dict[Any, int]:
        classes, counts = np.unique(self.y, return_counts=True)
        return dict(zip(classes.tolist(), counts.tolist(), strict=True))


def read_own_tasks(directory: str, spec: EpisodeSpec, *, invert: bool = False) -> list[OwnTask]:
    """The tasks of a directory, by name: each file or directory in it is one, as `metadist adapt` reads a support set.

    Raises DataError where it holds none, or one that does not fit `spec`.
    """
    place = Path(directory)
    if not place.is_dir():
        raise DataError(f"{directory}: no such directory. Give one that holds a file or a directory for each task.")
    entries = sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))
    if not entries:
        raise DataError(f"{directory}: holds no tasks. Add a file or a directory for each.")
    return [_task(entry.name, read_labelled(str(entry), spec, invert=invert), str(entry), spec) for entry in entries]


def _task(name: str, found: LabelledExamples, place: str, spec: EpisodeSpec) -> OwnTask:
    if found.y is None:
        target = "class" if spec.kind == "classification" else "target"
        raise DataError(f"{place}: a task needs targets. Add the column {target!r}, or directories a class.")
    if spec.kind == "classification":
        return OwnTask(name, found.x, found.y)
    targets = np.asarray(found.y, dtype=np.float32).reshape(len(found.x), -1)
    if targets.shape[1] != spec.output_size or not np.isfinite(targets).all():
        raise DataError(f"{place}: a target must be {spec.output_size} finite numbers. Correct the column 'target'.")
    return OwnTask(name, found.x, targets)


def sha256_of(tasks: Sequence[OwnTask]) -> str:
    """Of all that episodes depend on."""
    digest = hashlib.sha256()
    for task in tasks:
        for part in (task.name, task.x.shape, task.x.dtype.str, task.y.tolist()):
            digest.update(repr(part).encode() + b"\0")
        digest.update(np.ascontiguousarray(task.x).tobytes())
    return digest.hexdigest()


def fitted_source(source: TaskSource, tasks: Sequence[OwnTask]) -> TaskSource:
    """`source` with training episodes of a size that each of `tasks` can give too: with fewer queries, if need be.

    Raises DataError where a task is too small.
    """
    spec = spec_of(source, "train")
    if spec.kind == "regression":
        for task in tasks:
            _refuse_fewer_examples(task, spec.support_size + spec.query_size)
        return source
    sizes = sizes_of(spec)
    queries = min(_queries_of(task, sizes) for task in tasks)
    if queries == sizes.queries:
        return source
    if not isinstance(source, FewShotSource):
        raise DataError(
            f"the tasks have examples for {queries} queries a class, and this run's source gives episodes of"
            f" {sizes.queries} alone. Give {sizes.shots + sizes.queries} examples of each class."
        )
    settings = dataclasses.replace(
        source.settings, train_ways=sizes.ways, train_shots=sizes.shots, train_queries=queries
    )
    return FewShotSource(settings, source.pool)


def _queries_of(task: OwnTask, sizes: Sizes) -> int:
    """As many queries a class as its smallest class allows, up to the episodes' own number."""
    if len(task.class_sizes) < 2:
        raise DataError(f"task {task.name!r} has {len(task.class_sizes)} class, and 2 or more are needed. Add some.")
    name, smallest = min(task.class_sizes.items(), key=lambda item: item[1])
    if smallest <= sizes.shots:
        raise DataError(
            f"task {task.name!r}: class {name!r} has {smallest} examples, and an episode takes {sizes.shots} to adapt"
            " to and at least one more to score. Add some, or leave the class out."
        )
    return min(sizes.queries, smallest - sizes.shots)


def sizes_of(spec: EpisodeSpec) -> Sizes:
    """Ways, and support and query examples a class, of balanced episodes. Raises DataError where they are not."""
    ways = spec.output_size
    if spec.support_size % ways or spec.query_size % ways or not spec.support_size:
        raise DataError(
            f"this run's training episodes have {spec.support_size} support and {spec.query_size} query examples of"
            f" {ways} classes, which are not the same number of each; own tasks cannot be cut so."
        )
    return Sizes(ways, spec.support_size // ways, spec.query_size // ways)


def _refuse_fewer_examples(task: OwnTask, needed: int) -> None:
    if len(task.x) < needed:
        raise DataError(
            f"task {task.name!r} has {len(task.x)} examples, and an episode takes {needed}. Add some, or leave it out."
        )


@dataclass(frozen=True)
class OwnTaskSource:
    """Episodes of own tasks alone, of the training shape of the run's source.

    A task with fewer classes than an episode has ways is filled up with classes of an old training episode:
    its own must be told from each other and from those.
    """

    tasks: Sequence[OwnTask]
    old: TaskSource

    @property
    def spec(self) -> EpisodeSpec:
        return spec_of(self.old, "train")

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        return stacked([self.episode(key, key.task) for key in keys])

    def episode(self, key: TaskKey, number: int) -> EpisodeBatch:
        """The episode that `key` draws from task `number` (of an endless round of them), without a task axis."""
        task, random, spec = self.tasks[number % len(self.tasks)], generator(key), self.spec
        if spec.kind == "regression":
            rows = random.choice(len(task.x), spec.support_size + spec.query_size, replace=False)
            x, y = _inputs(task.x[rows]), torch.from_numpy(task.y[rows])
            cut = spec.support_size
            return EpisodeBatch(Examples(x[:cut], y[:cut]), Examples(x[cut:], y[cut:]))
        sizes = sizes_of(spec)
        classes = random.permutation(np.unique(task.y))[: sizes.ways]
        rows = np.stack(
            [
                random.choice(np.flatnonzero(task.y == label), sizes.shots + sizes.queries, replace=False)
                for label in classes
            ]
        )

        def part(chosen: np.ndarray) -> Examples:
            labels = torch.arange(len(classes)).repeat_interleave(chosen.shape[1])
            return Examples(_inputs(task.x[chosen.ravel()]), labels)

        own = EpisodeBatch(part(rows[:, : sizes.shots]), part(rows[:, sizes.shots :]))
        return own if len(classes) == sizes.ways else self._filled_up(own, len(classes), key)

    def _filled_up(self, own: EpisodeBatch, ways: int, key: TaskKey) -> EpisodeBatch:
        """With the classes from `ways` on of an old episode."""
        old = single(self.old, key._replace(split="train"))

        def together(mine: Examples, others: Examples) -> Examples:
            kept = others.y >= ways
            return Examples(torch.cat([mine.x, others.x[kept]]), torch.cat([mine.y, others.y[kept]]))

        return EpisodeBatch(together(own.support, old.support), together(own.query, old.query))


@dataclass(frozen=True)
class MixedSource:
    """A source whose training tasks are partly own ones; its other splits are as they were."""

    own: OwnTaskSource
    meta_batch_size: int
    share: float
    """Of own tasks among all, spread evenly over them."""

    @property
    def spec(self) -> EpisodeSpec:
        return self.own.old.spec

    @property
    def train_spec(self) -> EpisodeSpec:
        return self.own.spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        if keys[0].split != "train":
            return self.own.old.sample(keys)
        return stacked([self._episode(key) for key in keys])

    def _episode(self, key: TaskKey) -> EpisodeBatch:
        own_before, own_after = (
            int((key.step * self.meta_batch_size + key.task + past) * self.share) for past in (0, 1)
        )
        return self.own.episode(key, own_before) if own_after > own_before else single(self.own.old, key)


def single(source: TaskSource, key: TaskKey) -> EpisodeBatch:
    """A key's episode without a task axis."""
    support, query = source.sample([key])
    return EpisodeBatch(Examples(support.x[0], support.y[0]), Examples(query.x[0], query.y[0]))


def stacked(episodes: Sequence[EpisodeBatch]) -> EpisodeBatch:
    """Episodes without a task axis as one batch."""

    def part(members: Sequence[Examples]) -> Examples:
        return Examples(torch.stack([one.x for one in members]), torch.stack([one.y for one in members]))

    return EpisodeBatch(part([one.support for one in episodes]), part([one.query for one in episodes]))


def _inputs(values: np.ndarray) -> torch.Tensor:
    """float32, images as value / 255, as class pools give them."""
    scaled = values.astype(np.float32)
    return torch.from_numpy(scaled / np.float32(255) if values.dtype == np.uint8 else scaled)
