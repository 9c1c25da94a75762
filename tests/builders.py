"""Small experiments, modules and episodes that several tests share."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from metadist.algorithms import MAML
from metadist.config import Config
from metadist.core.algorithm import Algorithm
from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
from metadist.core.keys import TaskKey
from metadist.core.meta_gradient import MetaGradient, Sums
from metadist.core.network import Network, make_network
from metadist.core.params import Layout
from metadist.models import MLP, Conv4
from metadist.sections import ScalingSettings, TrainingSettings
from metadist.tasks import Sinusoid

# As the adapters do: the bits of a sum depend on the number of threads.
torch.set_num_threads(1)


class Quadratic(nn.Module):
    """Gives its one parameter vector w for every example, whatever the example is.

    With targets c for every example, the mean squared error is |w - c|^2 / d; its gradient is 2 (w - c) / d.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(start)

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(x.shape[0], -1)


def regression(inputs: int, outputs: int, support_size: int, query_size: int) -> EpisodeSpec:
    return EpisodeSpec(
        kind="regression",
        input_shape=(inputs,),
        output_size=outputs,
        support_size=support_size,
        query_size=query_size,
    )


def classification(input_shape: tuple[int, ...], ways: int, shots: int, queries: int) -> EpisodeSpec:
    return EpisodeSpec(
        kind="classification",
        input_shape=input_shape,
        output_size=ways,
        support_size=ways * shots,
        query_size=ways * queries,
    )


def smooth_mlp(spec: EpisodeSpec, seed: int = 0, units: int = 6) -> nn.Module:
    """Two hidden layers with tanh, so that finite differences are exact to their order, and random biases."""
    inputs = int(np.prod(spec.input_shape))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, units),
            nn.Tanh(),
            nn.Linear(units, units),
            nn.Tanh(),
            nn.Linear(units, spec.output_size),
        )


def small_conv4(spec: EpisodeSpec, seed: int = 0, **settings: object) -> nn.Module:
    """Conv-4 with few filters; its zero biases and unit scales are shaken, so that none of them is a special value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Conv4(**{"filters": 3, **settings}).build(spec)
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.2)
    return module


def random_episodes(spec: EpisodeSpec, tasks: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> EpisodeBatch:
    """Normal inputs; normal targets, or every class equally often in random order."""
    random = torch.Generator().manual_seed(seed)

    def examples(size: int) -> Examples:
        x = torch.randn(tasks, size, *spec.input_shape, generator=random, dtype=torch.float64)
        if spec.kind == "regression":
            y = torch.randn(tasks, size, spec.output_size, generator=random, dtype=torch.float64)
            return Examples(x.to(dtype), y.to(dtype))
        labels = torch.arange(size) % spec.output_size
        return Examples(
            x.to(dtype), torch.stack([labels[torch.randperm(size, generator=random)] for _ in range(tasks)])
        )

    return EpisodeBatch(examples(spec.support_size), examples(spec.query_size))


def task_of(batch: EpisodeBatch, task: int) -> EpisodeBatch:
    """One task of a batch, still with its task axis."""
    return EpisodeBatch(*(Examples(*(tensor[task : task + 1] for tensor in part)) for part in batch))


class Problem:
    """An algorithm on a module: everything that a meta-gradient needs, in float64 unless said otherwise."""

    def __init__(
        self,
        algorithm: Algorithm,
        module: nn.Module,
        spec: EpisodeSpec,
        *,
        policy: str = "transductive",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            prepared = algorithm.prepare(copy.deepcopy(module))
        self.algorithm, self.module, self.spec = algorithm, module, spec
        embedding = algorithm.model_output == "embedding"
        self.network: Network = make_network(
            prepared, spec, policy, embedding=embedding, inner_steps=algorithm.inner_steps
        )
        model_params = {name: value.detach() for name, value in prepared.named_parameters() if value.requires_grad}
        meta = model_params | algorithm.extra_parameters(self.network, model_params)
        self.layout = Layout.of(meta)
        self.theta = self.layout.flatten(meta).to(dtype)
        self.statistics = self.network.statistics_layout.flatten(self.network.statistics).to(dtype)

    def sums(self, batch: EpisodeBatch, *, strategy: str = "loop", compile: bool = False, step: int = 0) -> Sums:
        """Sums over all tasks of `batch`, as tasks of an outer step."""
        tasks = batch.support.x.shape[0]
        compute = MetaGradient(self.algorithm, self.network, self.layout, strategy=strategy, compile=compile)
        keys = [TaskKey(0, "train", step, task) for task in range(tasks)]
        return compute.sum_chunk(self.theta, self.statistics, batch, np.ones(tasks, np.float32), keys)

    def objective(self, theta: Tensor, batch: EpisodeBatch) -> Tensor:
        """Sum over tasks of the query loss after adaptation, straight from the algorithm's methods."""
        network = self.network.bind(self.statistics, training=True)
        algorithm = self.algorithm.at_step(0)
        constants = {name: value.to(theta) for name, value in self.algorithm.constants_at(0).items()}
        total = theta.new_zeros(())
        for task in range(batch.support.x.shape[0]):
            support, query = (Examples(part.x[task], part.y[task]) for part in batch)
            meta = self.layout.unflatten(theta) | constants
            total = total + algorithm.objective(network, meta, support, query)[0]
        return total


def tiny_config(**sections: object) -> Config:
    """Sinusoids, one hidden layer, two second-order steps, meta-batches of 11 in chunks of 3 (the last one short)."""
    defaults = {
        "task": Sinusoid(shots=3, queries=4),
        "model": MLP(hidden=(6,)),
        "algorithm": MAML(inner_lr=0.05, inner_steps=2),
        "training": TrainingSettings(steps=6, meta_batch_size=11, chunk_size=3, seed=5, compile=False),
        "scaling": ScalingSettings(num_workers=0),
    }
    return Config(**{**defaults, **sections})
