"""A chunk of episodes in, one summed meta-gradient out: the computation that everything else distributes."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.calibration import bin_sums
from metadist.core.episode import EpisodeBatch, Examples
from metadist.core.keys import TaskKey, seed_for_layers
from metadist.core.network import Network
from metadist.core.params import Layout, Params
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
    calibration: np.ndarray
    """`[policies, episodes, inner steps + 1, 3, BINS]`: see `calibration.bin_sums`; without bins in regression."""


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
        self.compile = compile
        self._functions: dict[Algorithm, Callable] = {}

    def sum_chunk(
        self, theta: Tensor, statistics: Tensor, batch: EpisodeBatch, weights: np.ndarray, keys: list[TaskKey]
    ) -> Sums:
        """Sums over one chunk at `theta: [theta]`; `weights: [tasks]` is 0 for tasks that only fill the chunk.

        Raises NonFiniteError, naming the task, where a loss or a meta-gradient is NaN or infinite.
        """
        tasks = [task for task, weight in enumerate(weights) if weight > 0]
        step = keys[0].step
        gradient_of = self._function(self.algorithm.at_step(step))
        constants = {name: value.to(theta) for name, value in self.algorithm.constants_at(step).items()}
        with torch.random.fork_rng(enabled=self.network.is_random):
            if self.network.is_random:
                # The chunk is the unit of computation, so its first task's key decides for all of it.
                torch.manual_seed(seed_for_layers(keys[0]))
            if self.strategy == "vmap":
                gradients, seen, metrics = gradient_of(theta, statistics, constants, batch.support, batch.query)
                # Filling tasks are left out rather than multiplied by 0: 0 * NaN is NaN.
                kept = slice(0, len(tasks))
                total = [part[kept].sum(0) for part in (gradients, seen, metrics)]
            else:
                total, losses = [], []
                for task in tasks:
                    parts = gradient_of(theta, statistics, constants, *_task(batch, task))
                    total = (
                        [mine.add_(part) for mine, part in zip(total, parts, strict=True)]
                        if total
                        else [part.clone() for part in parts]
                    )
                    losses.append(parts[2])
                metrics = torch.stack(losses)
        sums = Sums(*(part.numpy(force=True) for part in total))
        if not np.isfinite(sums.gradient).all() or not torch.isfinite(metrics[: len(tasks), 0]).all():
            self._raise_non_finite(theta, statistics, constants, batch, [keys[task] for task in tasks])
        return sums

    def _function(self, algorithm: Algorithm) -> Callable:
        """`_task_gradient` of an algorithm over one task or, with `vmap`, over a chunk; compiled at its first use."""
        if algorithm not in self._functions:
            function: Callable = partial(self._task_gradient, algorithm)
            if self.strategy == "vmap":
                function = torch.vmap(function, in_dims=(None, None, None, 0, 0), randomness="different")
            # Sizes never change within a run, so nothing is gained by code for any size.
            self._functions[algorithm] = torch.compile(function, dynamic=False) if self.compile else function
        return self._functions[algorithm]

    def _task_gradient(
        self,
        algorithm: Algorithm,
        theta: Tensor,
        statistics: Tensor,
        constants: Params,
        support: Examples,
        query: Examples,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One task's meta-gradient `[theta]`, its query set's statistics `[statistics]`, its metrics `[METRICS]`."""
        network = self.network.bind(statistics, training=True)
        meta = self.theta.unflatten(theta) | constants
        gradient, outcome = algorithm.meta_gradient(network, meta, support, query)
        with torch.no_grad():
            metrics = torch.stack([outcome.loss, network.accuracy_of(outcome.outputs, query.y)])
            seen = network.set_statistics(outcome.path, query.x)
        return self.theta.flatten(gradient), seen, metrics

    def _raise_non_finite(
        self, theta: Tensor, statistics: Tensor, constants: Params, batch: EpisodeBatch, keys: list[TaskKey]
    ) -> None:
        """Finds the first bad task of a chunk whose sums are not finite, and names it."""
        algorithm = self.algorithm.at_step(keys[0].step)
        for task, key in enumerate(keys):
            gradient, _, metrics = self._task_gradient(algorithm, theta, statistics, constants, *_task(batch, task))
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
    ways: int | None = None,
) -> EpisodeScores:
    """Adapts to each support set and scores the query set after 0, 1, .., `inner_steps` steps, under each policy.

    `ways` is for episodes that have other ways than those of the spec.
    """
    meta = theta.unflatten(vector)

    def score(support: Examples, query: Examples) -> tuple[Tensor, ...]:
        losses, accuracies, sums = [], [], []
        for policy in policies:
            bound = network.bind(statistics, training=False, policy=policy, test_ways=ways)
            path = algorithm.adapt(bound, meta, support, inner_steps)
            for loss, outputs in algorithm.losses_along(bound, path, support, query):
                losses.append(loss)
                accuracies.append(bound.accuracy_of(outputs, query.y))
                is_classification = bound.kind == "classification"
                sums.append(bin_sums(outputs, query.y) if is_classification else outputs.new_zeros(3, 0))
        return tuple(torch.stack(part).unflatten(0, (len(policies), -1)) for part in (losses, accuracies, sums))

    with torch.no_grad():
        if strategy == "vmap":
            parts = torch.vmap(score)(batch.support, batch.query)
        else:
            scores = [score(*_task(batch, task)) for task in range(batch.support.x.shape[0])]
            parts = tuple(torch.stack(part) for part in zip(*scores, strict=True))
    return EpisodeScores(*(part.transpose(0, 1).numpy(force=True) for part in parts))


def _task(batch: EpisodeBatch, task: int) -> tuple[Examples, Examples]:
    return Examples(batch.support.x[task], batch.support.y[task]), Examples(batch.query.x[task], batch.query.y[task])
