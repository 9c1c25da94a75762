"""What the object store loses with a node, after it was said to be there: theta, or the sums of a range.

Sums are lost before the learner takes them, or before another adapter adds them to its own.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from metadist import MetaTrainer, ScalingSettings, load_config
from metadist.core.plan import Plan
from metadist.distributed import combining
from metadist.distributed.ray_executor import RayExecutor
from metadist.distributed.remote_learner import RemoteLearner
from metadist.models import MLP
from metadist.training import Result

CONFIG = Path(__file__).parents[2] / "configs/sinusoid_maml.yaml"
pytestmark = pytest.mark.chaos


@pytest.fixture
def cluster(quiet_home: None) -> Iterator[Any]:
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=started.address, log_to_driver=False)
    yield started
    ray.shutdown()
    started.shutdown()


def fit(tmp_path: Path, workers: int, name: str) -> Result:
    """Twelve steps of a model that is large enough for Ray to keep it where it was made, and not with the driver."""
    config = load_config(CONFIG, ["training.steps=12", f"run.storage_path={tmp_path}", f"run.name={name}"])
    config = dataclasses.replace(config, model=MLP(hidden=(200, 200)), scaling=ScalingSettings(num_workers=workers))
    return MetaTrainer(config).fit(evaluate=False)


def hashes(result: Result) -> tuple[str, str]:
    return result.theta_sha256, result.optimizer_sha256


@pytest.mark.parametrize("what", ["theta", "sums", "parts"])
def test_what_is_lost_with_a_node_is_published_or_computed_again_and_costs_no_bit(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    node = cluster.add_node(num_cpus=1, resources={"there": 1})
    run, step, combine, ask_to_step = RayExecutor.run, RayExecutor.step, RayExecutor._combined, RemoteLearner.step
    lost, asked = [], []

    def copied(array: np.ndarray) -> np.ndarray:
        return array.copy()

    def lose_the_node() -> None:
        lost.append(node)
        cluster.remove_node(node, allow_graceful=False)

    def run_with_theta_there(executor: RayExecutor, plan: Plan, theta: Any) -> Any:
        if what == "theta" and plan.step == 7 and not lost:
            # The learner is beside the driver, and theta with it; here theta lies elsewhere.
            theta = ray.remote(copied).options(num_cpus=0, resources={"there": 1}, max_retries=0).remote(theta)
            ray.wait([theta], fetch_local=False)
            lose_the_node()
        return run(executor, plan, theta)

    def step_without_its_sums(executor: RayExecutor, plan: Plan, theta: Any, sums: dict[Any, Any]) -> Any:
        if what == "sums" and plan.step == 7:
            lose_the_node()
        return step(executor, plan, theta, sums)

    def combine_without_a_part(executor: RayExecutor, plan: Plan, theta: Any, sums: dict[Any, Any]) -> Any:
        if what == "parts" and plan.step == 7:
            lose_the_node()
        return combine(executor, plan, theta, sums)

    def counted(learner: RemoteLearner, plan: Plan, sums: dict[Any, Any]) -> Any:
        asked.append(plan.step)
        return ask_to_step(learner, plan, sums)

    monkeypatch.setattr(RayExecutor, "run", run_with_theta_there)
    monkeypatch.setattr(RayExecutor, "step", step_without_its_sums)
    monkeypatch.setattr(RayExecutor, "_combined", combine_without_a_part)
    monkeypatch.setattr(RemoteLearner, "step", counted)
    if what == "parts":
        monkeypatch.setattr(combining, "LEARNER_TAKES_BYTES", 0)
    disturbed = fit(tmp_path, 2, "disturbed")
    assert len(lost) == 1
    # Without a checkpoint the run begins anew where theta is lost; lost sums are made again for the same step.
    # A part is missed before the learner is asked.
    expected = {"theta": [*range(7), *range(12)], "sums": [*range(8), *range(7, 12)], "parts": [*range(12)]}
    assert asked == expected[what]
    assert what == "theta" or disturbed.chunks_recomputed > 0
    assert hashes(disturbed) == hashes(fit(tmp_path, 0, "alone"))
