"""A run's own tasks with classes of given sizes: what a task from its source is like, and how well it goes there."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metadist.core.episode import Examples
from metadist.core.keys import TaskKey
from metadist.errors import DataError
from metadist.tasks.few_shot import FewShot, FewShotSource

if TYPE_CHECKING:
    from metadist.adaptation import LoadedRun

REFERENCE_SEED = 2**63
"""Of the tasks that are compared with: no training or evaluation draws them."""
EXPECTATION_TASKS = 40
MOST_QUERIES = 5
"""A class, of those tasks."""


@dataclass(frozen=True)
class Expectation:
    """Accuracy on tasks of validation classes, whose ways and shots are those of the task at hand."""

    tasks: int
    mean: float
    range: tuple[float, float]
    """That holds 95 % of those tasks: the 2.5th and 97.5th percentile."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def expected_accuracy(run: "LoadedRun", sizes: tuple[int, ...], steps: int) -> Expectation | None:
    """After `steps` inner steps; None in regression, and where the run's source has no such tasks."""
    if run.spec.kind != "classification":
        return None
    try:
        tasks = tasks_like(run, "val", sizes, EXPECTATION_TASKS, MOST_QUERIES)
    except DataError:
        return None
    scores = []
    for support, query in tasks:
        network, path = run.path(support, len(sizes), steps)
        with torch.no_grad():
            outputs = run.experiment.algorithm.predict(network.at(len(path) - 1), path[-1], support, query.x)
        scores.append(float((outputs[:, : len(sizes)].argmax(1) == query.y).double().mean()))
    low, high = np.percentile(scores, (2.5, 97.5))
    return Expectation(len(scores), float(np.mean(scores)), (float(low), float(high)))


def tasks_like(
    run: "LoadedRun", split: str, sizes: tuple[int, ...], number: int, most_queries: int = 1
) -> list[tuple[Examples, Examples]]:
    """Support and query sets of a split's tasks, with so many support examples of each class (in regression, in all).

    Raises DataError where the run's source has no such tasks.
    """
    source: Any = run.experiment.source
    most = max(sizes)
    if isinstance(source, FewShotSource):
        smallest = int(min(source.pool.sizes()[source.pool.class_ids[name]].min() for name in ("train", "val")))
        if most >= smallest:
            raise DataError(
                f"the support set has {most} examples of one class, and the classes that this run's pool has to compare"
                f" with have {smallest}. Give at most {smallest - 1} a class."
            )
        asked = FewShot(
            pool=source.settings.pool,
            ways=len(sizes),
            shots=most,
            queries=min(most_queries, smallest - most),
            rotate_classes=source.settings.rotate_classes,
        )
        source = FewShotSource(asked, source.pool)
    tasks = []
    for task in range(number):
        support, query = source.sample([TaskKey(REFERENCE_SEED, split, 0, task)])
        x, y = support.x[0], support.y[0]
        if run.spec.kind == "classification":
            kept = torch.cat([torch.nonzero(y == label).flatten()[:size] for label, size in enumerate(sizes)])
        else:
            kept = torch.arange(len(y))[:most]
        if len(kept) != sum(sizes):
            raise DataError(
                f"the support set has {sum(sizes)} examples, and this run's tasks have {len(y)}, so there is nothing to"
                f" compare it with. Give {len(y)} examples."
            )
        tasks.append((Examples(x[kept], y[kept]), Examples(query.x[0], query.y[0])))
    return tasks
