"""Every algorithm of the package: the same bits on adapters of Ray as in this process; its test; its config."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from metadist.algorithms import ALGORITHMS
from metadist.config import Config
from metadist.core.compiled import written_down
from metadist.core.episode import Examples
from metadist.core.keys import TaskKey
from metadist.core.meta_gradient import MetaGradient
from metadist.core.outer import OuterSettings
from metadist.core.plan import plan_step
from metadist.distributed.actors import AdapterActor
from metadist.distributed.in_process import InProcessExecutor
from metadist.distributed.learner import Learner, LearnerState
from metadist.experiment import Experiment, make_experiment
from metadist.models import Conv4
from metadist.sections import ScalingSettings, TrainingSettings
from metadist.tasks import TASKS
from tests.distributed.test_same_bits import _random_images

ROOT = Path(__file__).parents[2]
SETTINGS = {"cavia": {"context_layer": "block3.norm", "num_context": 3}}
ON_POOLED_CLASSES = ("transfer", "nearest_centroid")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from metadist.tasks.class_pool import write_pool

    path = tmp_path_factory.mktemp("pool") / "pool.parquet"
    write_pool(_random_images(), path)
    return path


@pytest.fixture(scope="module")
def adapters(local_ray: None) -> list:
    return [ray.remote(AdapterActor).options(num_cpus=0.1).remote() for _ in range(2)]


def experiment_of(name: str, pool: Path, **settings: object) -> Experiment:
    task = "pooled_classes" if name in ON_POOLED_CLASSES else "few_shot"
    sizes = {"batch_size": 6} if task == "pooled_classes" else {}
    config = Config(
        task=TASKS[task](pool=str(pool), ways=3, shots=1, queries=2, **sizes),
        model=Conv4(filters=3, downsample="stride"),
        algorithm=ALGORITHMS[name](**SETTINGS.get(name, {}), **settings),
        # Seven tasks in chunks of two: four chunks, the last of them short.
        training=TrainingSettings(meta_batch_size=7, chunk_size=2, batch_norm="transductive", compile=False),
        scaling=ScalingSettings(num_workers=0),
    )
    return make_experiment(config)


def state_after_two_steps(experiment: Experiment, adapters: list) -> LearnerState:
    """With no adapters in this process, else with each range on the next of them."""
    if not adapters:
        executor = InProcessExecutor(experiment, OuterSettings(), 2)
        executor.start(None, None, lambda: False)
        for step in range(2):
            plan = plan_step(experiment.run_seed, step, 7, experiment.chunk_size)
            theta = executor.publish()
            executor.step(plan, theta, executor.run(plan, theta))
        executor.close()
        return executor.state()
    held = [ray.put(experiment)]
    ray.get([adapter.prepare.remote(held) for adapter in adapters])
    learner = Learner(experiment, OuterSettings(), 2)
    for step in range(2):
        plan = plan_step(experiment.run_seed, step, 7, experiment.chunk_size)
        ranges = plan.ranges(len(adapters))
        calls = [
            adapters[number % len(adapters)].sum_range.remote(plan, span, learner.publish())
            for number, span in enumerate(ranges)
        ]
        learner.step(plan, {span: sums for span, (_, sums) in zip(ranges, ray.get(calls), strict=True)})
    return learner.state()


@pytest.mark.ray
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_the_same_bits_with_0_1_and_2_adapters(name: str, pool: Path, adapters: list) -> None:
    experiment = experiment_of(name, pool)
    alone = state_after_two_steps(experiment, [])
    assert np.isfinite(alone.theta).all()
    if name != "scratch":  # It learns nothing, by its own definition.
        assert not np.array_equal(alone.theta, experiment.initial_theta)
    for number in (1, 2):
        found = state_after_two_steps(experiment, adapters[:number])
        assert found.theta.tobytes() == alone.theta.tobytes()
        for part, value in alone.optimizer.items():
            assert found.optimizer[part].tobytes() == value.tobytes()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_can_be_written_down_for_the_compiler(name: str, pool: Path) -> None:
    few = {"inner_steps": 2} if "inner_steps" in ALGORITHMS[name].__dataclass_fields__ else {}
    experiment = experiment_of(name, pool, **few)
    compute = MetaGradient(experiment.algorithm, experiment.network, experiment.theta, strategy="loop", compile=False)
    batch = experiment.source.sample([TaskKey(0, "train", 0, 0)])
    support, query = (Examples(part.x[0], part.y[0]) for part in batch)
    theta, statistics = torch.from_numpy(experiment.initial_theta), torch.from_numpy(experiment.initial_statistics)
    function = partial(compute._task_gradient, experiment.algorithm.at_step(0))
    arguments = (theta, statistics, experiment.algorithm.constants_at(0), support, query)
    leaves, structure = tree_flatten(arguments)
    graph = written_down(lambda *leaves: function(*tree_unflatten(list(leaves), structure)), leaves)
    torch.testing.assert_close(graph(*leaves)[0], function(*arguments)[0])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_test_and_a_config_of_its_own(name: str) -> None:
    assert (ROOT / "tests/algorithms" / f"test_{name}.py").exists()
    assert any(f"name: {name}\n" in path.read_text() for path in (ROOT / "configs").glob("*.yaml"))
