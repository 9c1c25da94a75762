"""What holds for all algorithms that work on embeddings, and a tiny experiment for them."""

import dataclasses
from pathlib import Path

import torch

from metadist import MetaTrainer
from metadist.config import Config
from metadist.core.algorithm import Algorithm
from metadist.core.episode import EpisodeBatch, Examples
from metadist.models import Conv4
from metadist.sections import EvaluationSettings, RunSettings, ScalingSettings, TrainingSettings
from metadist.tasks import FewShot
from metadist.tasks.class_pool import write_pool
from metadist.training import Result
from tests.algorithms.contracts import MakeProblem, in_float32, points, relative_error
from tests.builders import Problem
from tests.distributed.test_same_bits import _random_images


def predictions(problem: Problem, batch: EpisodeBatch, task: int = 0) -> torch.Tensor:
    """Outputs for a task's query set."""
    support, query = (Examples(part.x[task], part.y[task]) for part in batch)
    network, meta = problem.network, problem.layout.unflatten(problem.theta)
    (phi,) = problem.algorithm.adapt(network, meta, support, 0)
    return problem.algorithm.predict(network, phi, support, query.x)


def embedded(problem: Problem, batch: EpisodeBatch, task: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A task's support and query sets as the module itself embeds them; float64 `[examples, features]`."""
    module = problem.module.double()
    with torch.no_grad():
        return module(batch.support.x[task]), module(batch.query.x[task])


def check_that_order_and_grouping_do_not_matter(algorithm: Algorithm, made: MakeProblem = points) -> None:
    """Outputs are the same for a permuted support set, and a query's does not depend on those beside it."""
    problem, batch = made(algorithm)
    expected = predictions(problem, batch)
    order = torch.randperm(batch.support.x.shape[1], generator=torch.Generator().manual_seed(0))
    permuted = EpisodeBatch(Examples(*(part[:, order] for part in batch.support)), batch.query)
    torch.testing.assert_close(predictions(problem, permuted), expected, rtol=1e-10, atol=1e-12)
    alone = EpisodeBatch(batch.support, Examples(*(part[:, :1] for part in batch.query)))
    torch.testing.assert_close(predictions(problem, alone), expected[:1], rtol=1e-10, atol=1e-12)
    swapped = EpisodeBatch(Examples(batch.support.x.flip(1), batch.support.y), batch.query)
    assert not torch.allclose(predictions(problem, swapped), expected, rtol=1e-3), "the support's targets do not matter"


def check_compiled(algorithm: Algorithm) -> None:
    """Compiled equals eager, in float32."""
    problem, batch = points(algorithm)
    single = Problem(algorithm, problem.module, problem.spec, dtype=torch.float32)
    batch = EpisodeBatch(*(Examples(part.x.float(), in_float32(part.y)) for part in batch))
    compiled, eager = (single.sums(batch, compile=compile) for compile in (True, False))
    assert relative_error(compiled.gradient, eager.gradient) < 1e-5
    assert relative_error(compiled.metrics, eager.metrics) < 1e-5


def unequal_ways(tmp_path: Path, algorithm: Algorithm, policy: str = "transductive") -> Config:
    """Training episodes of 5 ways, 1 shot; test episodes of 3 ways, 2 shots; two steps over random images."""
    pool = tmp_path / "pool.parquet"
    if not pool.exists():
        write_pool(_random_images(), pool)
    return Config(
        task=FewShot(pool=str(pool), ways=3, shots=2, queries=1, train_ways=5, train_shots=1, train_queries=2),
        model=Conv4(filters=4),
        algorithm=algorithm,
        training=TrainingSettings(steps=2, meta_batch_size=3, chunk_size=1, batch_norm=policy, compile=False),
        evaluation=EvaluationSettings(episodes=4, val_episodes=2, every=1),
        scaling=ScalingSettings(num_workers=0),
        run=RunSettings(storage_path=str(tmp_path)),
    )


def fit(config: Config, workers: int = 0) -> Result:
    return MetaTrainer(
        config,
        scaling_config=ScalingSettings(num_workers=workers),
        run_config=dataclasses.replace(config.run, name=f"with_{workers}"),
    ).fit()
