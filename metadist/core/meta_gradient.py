"""A chunk of episodes in, one summed meta-gradient out: the computation that everything else distributes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metadist.core.algorithm import Algorithm
from metadist.core.batch_norm import BatchNormPolicy, Source
from metadist.core.calibration import bin_sums
from metadist.core.compiled import Compiled
from metadist.core.episode import EpisodeBatch, Examples
from metadist.core.keys import TaskKey, seed_for_layers
from metadist.core.network import Network
from metadist.core.params import Layout, Params
from metadist.errors import NonFiniteError, first_line

METRICS = ("loss", "accuracy")
"""Measured on each task's query set after adaptation; accuracy is NaN in regression."""

Strategy = Literal["vmap", "loop"]
Precision = Literal["float32", "bf16-mixed"]


class Sums(NamedTuple):
    """Sums over the tasks of a chunk, of a range of chunks or of a whole step; float32 vectors.

    Divided once, by the number of tasks that are in them, when the whole step is there.
    """

    gradient: np.ndarray
    """`[theta]`: meta-gradients."""
    statistics: np.ndarray
    """`[statistics]`: the query sets' batch-norm statistics; empty unless the policy is `running`."""
    metrics: np.ndarray
    """`[len(METRICS)]`."""
    left_out: np.ndarray = np.zeros(1, np.float32)
    """`[1]`: how many of the plan's tasks are not in these sums, being bad; exact below 2^24."""

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
        self,
        algorithm: Algorithm,
        network: Network,
        theta: Layout,
        *,
        strategy: Strategy,
        compile: bool,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> None:
        self.algorithm = algorithm
        self.network = network
        self.theta = theta
        self.strategy = strategy
        self.compile = compile
        self.device = device
        self.precision = precision
        self._functions: dict[Algorithm, Callable] = {}

    def sum_chunk(
        self, theta: Tensor, statistics: Tensor, batch: EpisodeBatch, weights: np.ndarray, keys: list[TaskKey]
    ) -> Sums:
        """Sums over one chunk at `theta: [theta]`; `weights: [tasks]` is 0 for tasks that only fill the chunk.

        Raises NonFiniteError, naming the task, where a loss or a meta-gradient is NaN or infinite.
        """
        tasks = [task for task, weight in enumerate(weights) if weight > 0]
        gradient_of, constants = self._at_step(theta, keys[0])
        with self._seeded(keys[0]):
            if self.strategy == "vmap":
                gradients, seen, metrics = gradient_of(theta, statistics, constants, batch.support, batch.query)
                # Tasks that do not count are left out rather than multiplied by 0: 0 * NaN is NaN.
                kept = slice(0, len(tasks)) if tasks == list(range(len(tasks))) else tasks
                total = [part[kept].sum(0) for part in (gradients, seen, metrics)]
                losses = metrics[kept, 0]
            else:
                total, each = [], []
                for task in tasks:
                    parts = gradient_of(theta, statistics, constants, *_task(batch, task))
                    total = (
                        [mine.add_(part) for mine, part in zip(total, parts, strict=True)]
                        if total
                        else [part.clone() for part in parts]
                    )
                    each.append(parts[2])
                losses = torch.stack(each)[:, 0]
        sums = Sums(*(part.numpy(force=True) for part in total))
        if not np.isfinite(sums.gradient).all() or not torch.isfinite(losses).all():
            self._raise_non_finite(theta, statistics, batch, weights, keys)
        return sums

    def bad_tasks(
        self, theta: Tensor, statistics: Tensor, batch: EpisodeBatch, weights: np.ndarray, keys: list[TaskKey]
    ) -> dict[int, str]:
        """The tasks of a chunk that raise, or are NaN or infinite, and what is wrong with each."""
        bad = {}
        for task, outcome in self.one_by_one(theta, statistics, batch, keys):
            if weights[task] == 0:
                continue
            if isinstance(outcome, Exception):
                bad[task] = f"adapting raised {type(outcome).__name__}: {first_line(outcome)}"
                continue
            gradient, _, metrics = outcome
            loss = float(metrics[0])
            if not np.isfinite(loss):
                bad[task] = f"query loss is {loss:g}"
            elif not torch.isfinite(gradient).all():
                bad[task] = f"query loss is {loss:g}, its meta-gradient is not finite"
        return bad

    def one_by_one(
        self, theta: Tensor, statistics: Tensor, batch: EpisodeBatch, keys: list[TaskKey]
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor] | Exception]]:
        """Each task's number with its meta-gradient, its statistics and its metrics, or with what it raised.

        With the compiled function of the `loop` strategy where that is this one's, so that the bits are the same.
        """
        gradient_of, constants = self._at_step(theta, keys[0])
        if self.strategy == "vmap":
            gradient_of = partial(self._task_gradient, self.algorithm.at_step(keys[0].step))
        with self._seeded(keys[0]):
            for task in range(len(keys)):
                try:
                    outcome = gradient_of(theta, statistics, constants, *_task(batch, task))
                except (MemoryError, torch.OutOfMemoryError):
                    raise
                except Exception as error:
                    outcome = error
                yield task, outcome

    def _at_step(self, theta: Tensor, key: TaskKey) -> tuple[Callable, Params]:
        """The function that computes a chunk (or a task, with `loop`) at a step, and its constants there."""
        constants = {name: value.to(theta) for name, value in self.algorithm.constants_at(key.step).items()}
        return self._function(self.algorithm.at_step(key.step)), constants

    @contextmanager
    def _seeded(self, first: TaskKey) -> Iterator[None]:
        """Layers that draw random numbers (dropout) draw those of a chunk.

        The chunk is the unit of computation, so its first task's key decides for all of it.
        """
        with torch.random.fork_rng(enabled=self.network.is_random):
            if self.network.is_random:
                torch.manual_seed(seed_for_layers(first))
            yield

    def _function(self, algorithm: Algorithm) -> Callable:
        """`_task_gradient` of an algorithm over one task or, with `vmap`, over a chunk; compiled at its first use."""
        if algorithm not in self._functions:
            function: Callable = partial(self._task_gradient, algorithm)
            if self.strategy == "vmap":
                function = torch.vmap(function, in_dims=(None, None, None, 0, 0), randomness="different")
            if self.compile:
                # Sizes never change within a run, so nothing is gained by code for any size.
                function = torch.compile(function, dynamic=False) if self.device == "cuda" else Compiled(function)
            self._functions[algorithm] = function
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
        # Without its cache, which would keep tensors of one derivative for another.
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16-mixed", cache_enabled=False):
            gradient, outcome = algorithm.meta_gradient(network, meta, support, query)
        with torch.no_grad():
            metrics = torch.stack([outcome.loss, network.accuracy_of(outcome.outputs, query.y)])
            seen = network.set_statistics(outcome.path, query.x)
        return self.theta.flatten(gradient), seen, metrics

    def _raise_non_finite(
        self, theta: Tensor, statistics: Tensor, batch: EpisodeBatch, weights: np.ndarray, keys: list[TaskKey]
    ) -> None:
        """Finds the first bad task of a chunk whose sums are not finite, and names it."""
        for task, reason in self.bad_tasks(theta, statistics, batch, weights, keys).items():
            raise NonFiniteError(
                f"task {keys[task]}: {reason}. Lower algorithm.inner_lr or outer.lr, or set outer.clip_norm; such tasks"
                " are left out with training.on_bad_episode: skip."
            )
        kept = [key for key, weight in zip(keys, weights, strict=True) if weight > 0]
        raise NonFiniteError(
            f"tasks {kept[0]} to {kept[-1]}: the sum of their meta-gradients overflows float32, though each is finite."
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
        # The inner loop sees the support set alone: policies that differ in the query set's statistics share it.
        paths: dict[Source, list[Params]] = {}
        for policy in policies:
            bound = network.bind(statistics, training=False, policy=policy, test_ways=ways)
            if bound.own_source not in paths:
                paths[bound.own_source] = algorithm.adapt(bound, meta, support, inner_steps)
            for loss, outputs in algorithm.losses_along(bound, paths[bound.own_source], support, query):
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
