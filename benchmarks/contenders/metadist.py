"""metadist: tasks in chunks, as an adapter computes them."""

from collections.abc import Callable
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.inner_loop_cases import Case
from metadist.algorithms import MAML
from metadist.config import Config
from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
from metadist.core.keys import TaskKey
from metadist.core.meta_gradient import Sums
from metadist.distributed.adapter import Adapter
from metadist.experiment import make_experiment
from metadist.sections import ScalingSettings, TrainingSettings

CHUNK_SIZE = 64
"""At most so many tasks at once: what they keep for the second derivative then fits into a core's cache."""


class _Episodes:
    """A task source that is never asked for more than its spec: the batch is there already."""

    def __init__(self, spec: EpisodeSpec) -> None:
        self.spec = spec

    def sample(self, keys: list[TaskKey]) -> EpisodeBatch:
        raise NotImplementedError


def prepare(case: Case, module: nn.Module, batch: EpisodeBatch, *, compile: bool = True) -> Callable[[], Tensor]:
    device = batch.support.x.device
    config = Config(
        task=_Episodes(case.spec),
        model=module.to("cpu"),
        algorithm=MAML(inner_lr=case.inner_lr, inner_steps=case.inner_steps, order=case.order),
        training=TrainingSettings(meta_batch_size=case.tasks, batch_norm="transductive", compile=compile),
        scaling=ScalingSettings(num_workers=0, use_gpu=device.type == "cuda"),
    )
    experiment = make_experiment(config)
    compute = Adapter(experiment).meta_gradient
    theta = torch.tensor(experiment.initial_theta, device=device)
    statistics = torch.tensor(experiment.initial_statistics, device=device)
    chunk_size = min(CHUNK_SIZE, case.tasks)
    chunks = [slice(start, start + chunk_size) for start in range(0, case.tasks, chunk_size)]
    batches = [EpisodeBatch(*(Examples(part.x[chunk], part.y[chunk]) for part in batch)) for chunk in chunks]
    weights, keys = np.ones(chunk_size, np.float32), [TaskKey(0, "train", 0, task) for task in range(chunk_size)]

    def meta_gradient() -> Tensor:
        sums = [compute.sum_chunk(theta, statistics, part, weights, keys) for part in batches]
        return torch.from_numpy(reduce(Sums.__add__, sums).gradient)

    return meta_gradient


prepare_eager = partial(prepare, compile=False)
"""The same without the compiler, as `training.compile: auto` has it for models without convolutions."""
