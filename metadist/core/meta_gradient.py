"""A chunk of episodes in, one summed meta-gradient out: the computation that everything else distributes."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.episode import EpisodeBatch, Examples
from metadist.core.keys import TaskKey
from metadist.core.network import Network
from metadist.core.params import Layout
from metadist.errors import NonFiniteError

METRICS = ("loss", "accuracy")
"""Measured on each task's query set after adaptation; accuracy is NaN in regression."""

Strategy = Literal["vmap", "loop"]


class Sums(NamedTuple):
    """Sums over the tasks of a chunk, of a range of chunks or of a whole step; float32 vectors.

    Divided once, by the number of tasks, when the whole step is there.
    """

    gradient: np.ndarray
    """`[theta]`: meta-gradients."""
    statistics: np.ndarray
    """`[statistics]`: the query sets' batch-norm statistics; empty unless the policy is `running`."""
    metrics: np.ndarray
    """`[len(METRICS)]`."""

    def __add__(self, other: "Sums") -> "Sums":  # type: ignore[override]
        return Sums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


class EpisodeScores(NamedTuple):
    """Scores of adapted models, float32 `[policies, episodes, inner steps + 1]`."""

    loss: np.ndarray
    accuracy: np.ndarray


class MetaGradient:
    """Computes the summed meta-gradient of a chunk of episodes, all at once (`vmap`) or one by one (`loop`).

    Pure: equal inputs give equal bits, in any process with the same numeric fingerprint.
    """

    def __init__(
        self, algorithm: Algorithm, network: Network, theta: Layout, *, strategy: Strategy, compile: bool
    ) -> None:
        self.algorithm = algorithm
        self.network = network
        self.theta = theta
        self.strategy = strategy
        function: Callable = self._task_gradient
        if strategy == "vmap":
            function = torch.vmap(function, in_dims=(None, None, 0, 0))
        # Sizes never change within a run, so nothing is gained by code for any size.
        self._gradients = torch.compile(function, dynamic=False) if compile else function

    def sum_chunk(
        self, theta: Tensor, statistics: Tensor, batch: EpisodeBatch, weights: np.ndarray, keys: list[TaskKey]
    ) -> Sums:
        """Sums over one chunk at `theta: [theta]`; `weights: [tasks]` is 0 for tasks that only fill the chunk.

        Raises NonFiniteError, naming the task, where a loss or a meta-gradient is NaN or infinite.
        """
        tasks = [task for task, weight in enumerate(weights) if weight > 0]
        if self.strategy == "vmap":
            gradients, seen, metrics = self._gradients(theta, statistics, batch.support, batch.query)
            # Filling tasks are left out rather than multiplied by 0: 0 * NaN is NaN.
            kept = slice(0, len(tasks))
            total = [part[kept].sum(0) for part in (gradients, seen, metrics)]
        else:
            total, losses = [], []
            for task in tasks:
                parts = self._gradients(theta, statistics, *_task(batch, task))
                total = (
                    [mine.add_(part) for mine, part in zip(total, parts, strict=True)]
                    if total
                    else [part.clone() for part in parts]
                )
                losses.append(parts[2])
            metrics = torch.stack(losses)
        sums = Sums(*(part.numpy(force=True) for part in total))
        if not np.isfinite(sums.gradient).all() or not torch.isfinite(metrics[: len(tasks), 0]).all():
            self._raise_non_finite(theta, statistics, batch, [keys[task] for task in tasks])
        return sums

    def _task_gradient(
        self, theta: Tensor, statistics: Tensor, support: Examples, query: Examples
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One task's meta-gradient `[theta]`, its query set's statistics `[statistics]`, its metrics `[METRICS]`."""
        network = self.network.bind(statistics, training=True)

        def objective(theta: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            meta = self.theta.unflatten(theta)
            phi = self.algorithm.adapt(network, meta, support, self.algorithm.inner_steps)[-1]
            loss, outputs = self.algorithm.query_loss(network, phi, support, query)
            metrics = torch.stack([loss.detach(), network.accuracy_of(outputs.detach(), query.y)])
            return loss, (network.set_statistics(phi, query.x), metrics)

        gradient, (seen, metrics) = torch.func.grad(objective, has_aux=True)(theta)
        return gradient, seen, metrics

    def _raise_non_finite(self, theta: Tensor, statistics: Tensor, batch: EpisodeBatch, keys: list[TaskKey]) -> None:
        """Finds the first bad task of a chunk whose sums are not finite, and names it."""
        for task, key in enumerate(keys):
            gradient, _, metrics = self._task_gradient(theta, statistics, *_task(batch, task))
            loss = float(metrics[0])
            if not np.isfinite(loss) or not torch.isfinite(gradient).all():
                what = f"query loss is {loss:g}" + (
                    "" if not np.isfinite(loss) else ", its meta-gradient is not finite"
                )
                raise NonFiniteError(
                    f"task {key}: {what}. Lower algorithm.inner_lr or outer.lr, or set outer.clip_norm."
                )
        raise NonFiniteError(
            f"tasks {keys[0]} to {keys[-1]}: the sum of their meta-gradients overflows float32, though each is finite."
            " Lower algorithm.inner_lr or outer.lr."
        )


def score_episodes(
    algorithm: Algorithm,
    network: Network,
    theta: Layout,
    vector: Tensor,
    statistics: Tensor,
    batch: EpisodeBatch,
    *,
    inner_steps: int,
    policies: list[BatchNormPolicy],
    strategy: Strategy,
) -> EpisodeScores:
    """Adapts to each support set and scores the query set after 0, 1, .., `inner_steps` steps, under each policy."""
    meta = theta.unflatten(vector)

    def score(support: Examples, query: Examples) -> tuple[Tensor, Tensor]:
        losses, accuracies = [], []
        for policy in policies:
            bound = network.bind(statistics, training=False, policy=policy)
            for phi in algorithm.adapt(bound, meta, support, inner_steps):
                loss, outputs = algorithm.query_loss(bound, phi, support, query)
                losses.append(loss)
                accuracies.append(bound.accuracy_of(outputs, query.y))
        shape = (len(policies), -1)
        return torch.stack(losses).view(shape), torch.stack(accuracies).view(shape)

    with torch.no_grad():
        if strategy == "vmap":
            loss, accuracy = torch.vmap(score)(batch.support, batch.query)
        else:
            scores = [score(*_task(batch, task)) for task in range(batch.support.x.shape[0])]
            loss, accuracy = (torch.stack(part) for part in zip(*scores, strict=True))
    return EpisodeScores(loss.transpose(0, 1).numpy(force=True), accuracy.transpose(0, 1).numpy(force=True))


def _task(batch: EpisodeBatch, task: int) -> tuple[Examples, Examples]:
    return Examples(batch.support.x[task], batch.support.y[task]), Examples(batch.query.x[task], batch.query.y[task])
