"""Problems and experiments for the algorithms that train on pooled classes."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from metadist.config import Config
from metadist.core.algorithm import Algorithm
from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.network import make_network
from metadist.core.params import Layout
from metadist.models import Conv4
from metadist.sections import EvaluationSettings, RunSettings, ScalingSettings, TrainingSettings
from metadist.tasks import PooledClasses
from metadist.tasks.class_pool import write_pool
from tests.algorithms.contracts import relative_error
from tests.builders import Problem, classification, random_episodes, small_conv4, smooth_mlp
from tests.distributed.test_same_bits import _random_images


def training_points(algorithm: Algorithm) -> tuple[Problem, EpisodeBatch]:
    """Two mini-batches of 12 points of 4 classes, no support set; a smooth network embeds them into 4 dimensions."""
    spec = classification((2,), ways=4, shots=0, queries=3)
    return Problem(algorithm, smooth_mlp(spec), spec), random_episodes(spec, 2, seed=1)


def training_images(algorithm: Algorithm) -> tuple[Problem, EpisodeBatch]:
    """Two mini-batches of 8 images of 4 classes, no support set, for a Conv-4 with batch norm."""
    spec = classification((1, 16, 16), ways=4, shots=0, queries=2)
    return Problem(algorithm, small_conv4(spec), spec), random_episodes(spec, 2, seed=2)


class AtTest:
    """An algorithm in evaluation, in float64: trained over 7 classes, tested on episodes of 3 ways and 2 shots."""

    def __init__(self, algorithm: Algorithm, *, images: bool = False, policy: str = "transductive") -> None:
        self.algorithm = algorithm
        shape = (1, 16, 16) if images else (2,)
        self.spec = classification(shape, ways=3, shots=2, queries=2)
        train = EpisodeSpec(kind="classification", input_shape=shape, output_size=7, support_size=0, query_size=5)
        # Embeddings of 5 features.
        embedding = classification(shape, ways=5, shots=1, queries=1)
        self.module = small_conv4(embedding) if images else smooth_mlp(embedding)
        network = make_network(
            self.module, self.spec, policy, train_spec=train, embedding=True, inner_steps=algorithm.inner_steps
        )
        params = {name: value.detach() for name, value in self.module.named_parameters()}
        meta = params | algorithm.extra_parameters(network, params)
        self.layout = Layout.of(meta)
        self.theta = self.layout.flatten(meta).double()
        self.statistics = network.statistics_layout.flatten(network.statistics).double()
        self.trained = network
        self.network = network.bind(self.statistics, training=False)
        self.meta = self.layout.unflatten(self.theta)
        self.batch = random_episodes(self.spec, 2, seed=3)
        self.module.double()


def check_training_is_that_of_a_plain_classifier(algorithm: Algorithm, label_smoothing: float) -> None:
    """The meta-gradient is torch's own gradient of a module with one more linear layer behind it."""
    for made in (training_points, training_images):
        problem, batch = made(algorithm)
        network = make_network(
            problem.module, problem.spec, "transductive", embedding=True, label_smoothing=label_smoothing
        )
        problem.network = network
        expected = torch.zeros_like(problem.theta)
        meta = problem.layout.unflatten(problem.theta)
        for x, y in zip(*batch.query, strict=True):
            head = torch.nn.Linear(4, 4).double()
            classifier = torch.nn.Sequential(problem.module.double(), head).train()
            classifier.zero_grad()
            with torch.no_grad():
                head.weight.copy_(meta["pooled_head.weight"])
                head.bias.copy_(meta["pooled_head.bias"])
            F.cross_entropy(classifier(x), y, label_smoothing=label_smoothing).backward()
            expected += torch.cat([parameter.grad.flatten() for parameter in classifier.parameters()])
        for strategy in ("loop", "vmap"):
            assert relative_error(problem.sums(batch, strategy=strategy).gradient, expected) < 1e-6


def tiny_run(tmp_path: Path, algorithm: Algorithm, policy: str = "running", **task: Any) -> Config:
    """Three steps over random images of 6 classes a split, mini-batches of 4; 3-way 1-shot at test."""
    pool = tmp_path / "pool.parquet"
    if not pool.exists():
        write_pool(_random_images(), pool)
    return Config(
        task=PooledClasses(**{"pool": str(pool), "batch_size": 4, "ways": 3, "queries": 2, **task}),
        model=Conv4(filters=4),
        algorithm=algorithm,
        training=TrainingSettings(steps=3, meta_batch_size=5, chunk_size=2, batch_norm=policy, compile=False),
        evaluation=EvaluationSettings(episodes=5, val_episodes=3, every=2),
        scaling=ScalingSettings(num_workers=0),
        run=RunSettings(storage_path=str(tmp_path), name="run"),
    )
