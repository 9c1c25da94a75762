"""The tasks and models on which `benchmarks.inner_loop` and `benchmarks.gpu` measure meta-gradients."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_

from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
from metadist.core.keys import TaskKey, generator
from metadist.models import MLP, Conv4, ResNet12
from metadist.tasks import Sinusoid


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model with so many tasks of one shape."""

    name: str
    model: MLP | Conv4 | ResNet12
    spec: EpisodeSpec
    tasks: int
    inner_lr: float
    inner_steps: int = 1
    first_task: int = 0
    """Where an activation is zero but for rounding, the gradient is a toss-up, and another implementation may give one
    that differs by a thousandth. Tasks that have such a one are passed over."""
    order: Literal["first", "second"] = "second"

    @property
    def has_convolutions(self) -> bool:
        return not isinstance(self.model, MLP)

    def module(self) -> nn.Module:
        """The same weights at every call. Batch norm normalises each set by its own statistics and keeps none."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module: nn.Module = replace_all_batch_norm_modules_(self.model.build(self.spec))
            return module

    def batch(self) -> EpisodeBatch:
        """The same tasks at every call: sinusoids, or normal pixels, since times do not depend on them."""
        keys = [TaskKey(0, "train", 0, task) for task in range(self.first_task, self.first_task + self.tasks)]
        if self.spec.kind == "regression":
            return Sinusoid(shots=self.spec.support_size, queries=self.spec.query_size).sample(keys)
        return EpisodeBatch(*(self._images(keys, size, number) for number, size in enumerate(self._sizes)))

    @property
    def _sizes(self) -> tuple[int, int]:
        return self.spec.support_size, self.spec.query_size

    def _images(self, keys: list[TaskKey], size: int, number: int) -> Examples:
        shape = (size, *self.spec.input_shape)
        x = np.stack([generator(key._replace(step=number)).standard_normal(shape, np.float32) for key in keys])
        labels = torch.arange(size) % self.spec.output_size
        return Examples(torch.from_numpy(x), labels.expand(len(keys), size).contiguous())

    def one_by_one(self, batch: EpisodeBatch) -> list[tuple[Examples, Examples]]:
        """Each task's support and query set."""
        support, query = ([Examples(*pair) for pair in zip(*part, strict=True)] for part in batch)
        return list(zip(support, query, strict=True))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy or mean squared error, a scalar."""
        return F.mse_loss(outputs, targets) if self.spec.kind == "regression" else F.cross_entropy(outputs, targets)


def _sinusoids(tasks: int, inner_steps: int, order: Literal["first", "second"]) -> Case:
    return Case(
        name=f"MLP 40-40, {tasks} tasks, {inner_steps} {'step' if inner_steps == 1 else 'steps'}, {order} order",
        model=MLP(hidden=(40, 40)),
        spec=Sinusoid(shots=10, queries=10).spec,
        tasks=tasks,
        inner_lr=0.01,
        inner_steps=inner_steps,
        order=order,
    )


def _images(
    name: str,
    model: Conv4 | ResNet12,
    shape: tuple[int, ...],
    sizes: tuple[int, int, int],
    tasks: int,
    first_task: int = 0,
) -> Case:
    ways, shots, queries = sizes
    spec = EpisodeSpec(
        kind="classification",
        input_shape=shape,
        output_size=ways,
        support_size=ways * shots,
        query_size=ways * queries,
    )
    return Case(
        name=f"{name}, {ways}w{shots}s, {queries} {'query' if queries == 1 else 'queries'}",
        model=model,
        spec=spec,
        tasks=tasks,
        inner_lr=0.1,
        first_task=first_task,
    )


OMNIGLOT, MINI_IMAGENET = (1, 28, 28), (3, 84, 84)
STRIDED, MAX_POOL = Conv4(downsample="stride", head="mean"), Conv4()

CASES: dict[str, Case] = {
    **{
        f"mlp_{tasks}_tasks_{steps}_steps_{order}": _sinusoids(tasks, steps, order)
        for tasks in (25, 256)
        for steps in (1, 5)
        for order in ("second", "first")
    },
    "strided": _images("strided Conv-4", STRIDED, OMNIGLOT, (5, 1, 1), tasks=8),
    "max_pool": _images("max-pool Conv-4", MAX_POOL, OMNIGLOT, (5, 1, 15), tasks=2, first_task=1),
    "max_pool_20_ways": _images("max-pool Conv-4", MAX_POOL, OMNIGLOT, (20, 5, 5), tasks=1, first_task=6),
    "resnet12": _images("ResNet-12", ResNet12(dropout=0.0, drop_block_rate=0.0), MINI_IMAGENET, (5, 1, 1), tasks=1),
}
QUICK = ("mlp_25_tasks_1_steps_second", "strided")
