"""One-dimensional regression: a task's function, and the model before and after it adapts, at many points."""

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch

from metadist.config import Config
from metadist.core.episode import Examples
from metadist.distributed.learner import LearnerState
from metadist.experiment import Experiment, open_task
from metadist.reporting.adaptation import Adaptation

POINTS = 120


@dataclass(frozen=True)
class Curves:
    """Of one episode, by its number among those adapted to; all `[points]`, x ascending."""

    episode: int
    x: np.ndarray = field(repr=False)
    y: np.ndarray = field(repr=False)
    predicted: dict[int, np.ndarray] = field(repr=False)
    """By the number of inner steps."""


def curves_of(
    config: Config, experiment: Experiment, state: LearnerState, adaptation: Adaptation, episodes: list[int]
) -> list[Curves]:
    """None at all where the task is of another kind, or its number of query points cannot be chosen."""
    spec = experiment.source.spec
    if spec.kind != "regression" or spec.input_shape != (1,) or spec.output_size != 1:
        return []
    if not dataclasses.is_dataclass(config.task) or not hasattr(config.task, "queries"):
        return []
    source = open_task(dataclasses.replace(config.task, queries=POINTS))  # type: ignore[type-var]
    network = experiment.network.bind(torch.tensor(state.statistics), training=False)
    meta = experiment.theta.unflatten(torch.tensor(state.theta))
    found = []
    for number in episodes:
        batch = source.sample([adaptation.episodes[number].key])
        support = Examples(batch.support.x[0], batch.support.y[0])
        if not torch.equal(support.x, adaptation.episodes[number].support.x):
            return []  # Another number of query points is another episode in this source.
        x, order = torch.sort(batch.query.x[0], dim=0)
        with torch.no_grad():
            path = experiment.algorithm.adapt(network, meta, support, adaptation.steps)
            predicted = {
                step: experiment.algorithm.predict(network.at(step), path[step], support, x)[:, 0].numpy()
                for step in sorted({0, min(1, len(path) - 1), len(path) - 1})
            }
        found.append(Curves(number, x[:, 0].numpy(), batch.query.y[0][order[:, 0], 0].numpy(), predicted))
    return found
