"""Runs on a cluster of several nodes: too small, growing, shrinking."""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadist import Callback, MetaTrainer, load_config
from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.keys import TaskKey
from metadist.core.plan import plan_step
from metadist.distributed.access import refuse_open_head
from metadist.distributed.doctor import diagnose
from metadist.distributed.in_process import InProcessExecutor
from metadist.distributed.placement import Node, adapter_options, beside_the_driver, check_fits, matches
from metadist.errors import ClusterError, InterruptedRun
from metadist.experiment import make_experiment
from metadist.sections import ScalingSettings
from metadist.tasks.sinusoid import Sinusoid
from metadist.training import Result
from tests.distributed.faulty import processes_named

CONFIG = Path(__file__).parents[2] / "configs/sinusoid_maml.yaml"
WAIT_S = 120


@dataclass(frozen=True)
class SharesItsData:
    """Sinusoids with a big array beside them; an adapter refuses to sample where it has a private copy of it."""

    data: np.ndarray = field(default_factory=lambda: np.zeros(10**6))
    driver: int = field(default_factory=os.getpid)

    @property
    def spec(self) -> EpisodeSpec:
        return Sinusoid().spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        if os.getpid() != self.driver and (self.data.flags.writeable or self.data.flags.owndata):
            raise AssertionError("this adapter has a copy of its own")
        return Sinusoid().sample(keys)


@dataclass(frozen=True)
class OnlyWhere:
    """Sinusoids; an adapter refuses to sample on a node whose label `accelerator` is another."""

    label: str
    driver: int = field(default_factory=os.getpid)

    @property
    def spec(self) -> EpisodeSpec:
        return Sinusoid().spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        import ray

        if os.getpid() != self.driver and ray.get_runtime_context().get_node_labels().get("accelerator") != self.label:
            raise AssertionError("this adapter is on another node")
        return Sinusoid().sample(keys)


@pytest.fixture(scope="module")
def cluster(ray_home: dict[str, str]) -> Iterator[Any]:
    """A cluster whose head has one CPU."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=started.address, log_to_driver=False)
    yield started
    ray.shutdown()
    started.shutdown()


def fit(tmp_path: Path, workers: int | ScalingSettings, name: str, steps: int, **replaced: Any) -> Result:
    config = load_config(CONFIG, [f"training.steps={steps}", "evaluation.episodes=10"])
    return MetaTrainer(
        dataclasses.replace(config, **replaced),
        scaling_config=workers if isinstance(workers, ScalingSettings) else ScalingSettings(num_workers=workers),
        run_config=dataclasses.replace(config.run, name=name, storage_path=str(tmp_path)),
    ).fit(evaluate=False)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def hashes(result: Result) -> tuple[str, str]:
    return result.theta_sha256, result.optimizer_sha256


@pytest.mark.ray
def test_a_cluster_with_too_few_cpus_is_refused_with_the_arithmetic(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"2 adapters of CPU 1 each do not fit .* has CPU 1 on 1 node: room for 1\."):
        fit(tmp_path, 2, "too_many", 2)


def test_room_is_counted_node_by_node() -> None:
    # Two nodes with 3 CPUs each hold 2 adapters of 2 CPUs, not 6 // 2 = 3.
    scaling = ScalingSettings(num_workers=3, resources_per_worker={"CPU": 2.0})
    nodes = [Node({"CPU": 3.0}), Node({"CPU": 3.0})]
    with pytest.raises(ClusterError, match="room for 2"):
        check_fits(scaling, nodes, lambda: False)
    check_fits(scaling, [*nodes, Node({"CPU": 2.0})], lambda: False)
    check_fits(scaling, nodes, lambda: True)
    # Adapters of 0.6 GPUs: one on each of two GPUs, not 2 / 0.6 = 3.
    scaling = ScalingSettings(num_workers=3, resources_per_worker={"GPU": 0.6})
    with pytest.raises(ClusterError, match="room for 2"):
        check_fits(scaling, [Node({"GPU": 2.0})], lambda: False)
    with pytest.raises(ClusterError, match="GPU 1 each"):
        check_fits(ScalingSettings(num_workers=1, use_gpu=True), nodes, lambda: False)


@pytest.mark.parametrize(
    ("rule", "fitting"),
    [
        ("a", ["a"]),
        ("!a", ["b", "c", None]),
        ("in(a,b)", ["a", "b"]),
        ("in(a, b)", ["a", "b"]),
        ("!in(a,b)", ["c", None]),
    ],
)
def test_a_rule_for_labels_means_what_it_means_to_ray(rule: str, fitting: list[str | None]) -> None:
    assert [label for label in ("a", "b", "c", None) if matches(label, rule)] == fitting


@pytest.mark.ray
@pytest.mark.long
def test_adapters_share_the_gpu_of_the_node_whose_labels_are_asked_for(cluster: Any, tmp_path: Path) -> None:
    import ray

    # The GPU is one in name only, so the run computes on CPUs; the head has room for one adapter, and another label.
    scaling = ScalingSettings(
        num_workers=2, resources_per_worker={"CPU": 0.5, "GPU": 0.5}, label_selector={"accelerator": "in(x, y)"}
    )
    node = cluster.add_node(num_cpus=1, num_gpus=1, labels={"accelerator": "x"})
    try:
        assert fit(tmp_path, scaling, "labelled", 2, task=OnlyWhere(label="x")).step == 2
        unlabelled = dataclasses.replace(scaling, label_selector={"accelerator": "z"})
        with pytest.raises(ClusterError, match=r"has CPU 0, GPU 0 on 0 nodes of 2 with accelerator: z: room for 0\."):
            fit(tmp_path, unlabelled, "refused", 2)
    finally:
        cluster.remove_node(node)
    # The next run must not be given a place there.
    wait_for(lambda: sum(found["Alive"] for found in ray.nodes()) == 1)


class Where:
    def node(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()


@pytest.mark.ray
@pytest.mark.long
def test_adapters_are_packed_or_spread_as_is_asked(cluster: Any) -> None:
    import ray

    added = [cluster.add_node(num_cpus=8, resources={"here": 1}) for _ in range(2)]
    for strategy, nodes in (("PACK", 1), ("SPREAD", 2)):
        scaling = ScalingSettings(resources_per_worker={"CPU": 1, "here": 0.01}, placement_strategy=strategy)
        placed, actors = ray.remote(Where).options(**adapter_options(scaling)), []
        for _ in range(2):
            # One after the other, so that Ray knows what the first one took.
            actors.append(placed.remote())
            ray.get(actors[-1].node.remote())
        assert len(set(ray.get([actor.node.remote() for actor in actors]))) == nodes
    for node in added:
        cluster.remove_node(node)
    wait_for(lambda: sum(found["Alive"] for found in ray.nodes()) == 1)


@pytest.mark.ray
def test_a_learner_on_a_gpu_needs_one_on_the_drivers_node(cluster: Any, tmp_path: Path) -> None:
    import ray

    node = cluster.add_node(num_cpus=1, num_gpus=1)
    with pytest.raises(ClusterError, match=r"scaling.learner_gpus: 0.5 do not fit the node of this process, .* GPU 0;"):
        fit(tmp_path, ScalingSettings(num_workers=1, learner_gpus=0.5), "refused", 2)
    cluster.remove_node(node)
    wait_for(lambda: sum(found["Alive"] for found in ray.nodes()) == 1)


@pytest.mark.ray
@pytest.mark.long
def test_what_goes_beside_the_driver_goes_to_no_other_node(cluster: Any) -> None:
    import ray

    node = cluster.add_node(num_cpus=1)
    placed = ray.remote(Where).options(num_cpus=0, scheduling_strategy=beside_the_driver())
    actors = [placed.remote() for _ in range(6)]
    assert set(ray.get([actor.node.remote() for actor in actors])) == {ray.get_runtime_context().get_node_id()}
    cluster.remove_node(node)
    wait_for(lambda: sum(found["Alive"] for found in ray.nodes()) == 1)


@pytest.mark.ray
def test_big_arrays_of_a_source_are_shared_by_the_adapters_of_a_node(cluster: Any, tmp_path: Path) -> None:
    assert fit(tmp_path, 1, "shared", 2, task=SharesItsData()).step == 2


@pytest.mark.ray
def test_a_cluster_elsewhere_that_lets_anybody_in_is_refused_unless_told_otherwise(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Ray gives a cluster the address by which others reach this machine, and this one asks for no token.
    assert not cluster.address.startswith("127.")
    monkeypatch.delenv("METADIST_INSECURE", raising=False)
    with pytest.raises(ClusterError, match=r"asks for no token: .* go on all the same with --insecure"):
        refuse_open_head(cluster.address)
    refuse_open_head(f"127.0.0.1:{cluster.address.rpartition(':')[2]}")
    command = [sys.executable, "-m", "metadist", "train", str(CONFIG), "--run-dir", str(tmp_path / "run")]
    command += ["--address", "auto"]
    joining = subprocess.run(
        command, env=os.environ | {"RAY_ADDRESS": cluster.address}, capture_output=True, text=True, timeout=WAIT_S
    )
    assert joining.returncode == 2, joining.stderr
    assert f"{cluster.address} is not on this machine and asks for no token" in " ".join(joining.stderr.split())
    monkeypatch.setenv("METADIST_INSECURE", "1")
    refuse_open_head(cluster.address)
    (finding,) = [finding for finding in diagnose(cluster.address) if finding.name == "Ray authentication"]
    assert finding.status == "wrong"
    assert "is open: whoever reaches it can run code there" in finding.found


@pytest.mark.ray
@pytest.mark.long
def test_a_node_that_comes_is_used_and_one_that_goes_is_missed_by_nobody(cluster: Any, tmp_path: Path) -> None:
    steps, results = 800, []
    config = load_config(CONFIG, [f"training.steps={steps}", "run.checkpoint_config.checkpoint_frequency=50"])
    # All are kept, so that their number tells the progress.
    kept = dataclasses.replace(config.run.checkpoint_config, num_to_keep=1000)
    trainer = MetaTrainer(
        config,
        scaling_config=ScalingSettings(num_workers=(1, 2)),
        run_config=dataclasses.replace(config.run, name="elastic", storage_path=str(tmp_path), checkpoint_config=kept),
    )

    def adapters() -> int:
        return len(processes_named("ray::AdapterActor", os.getpid()))

    def checkpoints() -> int:
        return len(list((tmp_path / "elastic/checkpoints").glob("*")))

    run = threading.Thread(target=lambda: results.append(trainer.fit(evaluate=False)))
    run.start()
    wait_for(lambda: adapters() == 1)
    node = cluster.add_node(num_cpus=1)
    wait_for(lambda: adapters() == 2)
    progress = checkpoints()
    wait_for(lambda: checkpoints() > progress)
    cluster.remove_node(node, allow_graceful=False)
    run.join()
    assert results[0].adapters_lost == 1
    assert hashes(results[0]) == hashes(fit(tmp_path, 0, "alone", steps))


@pytest.mark.ray
@pytest.mark.parametrize("backend", ["actors", pytest.param("train", marks=pytest.mark.long)])
def test_a_run_whose_own_node_is_about_to_be_taken_away_ends_with_a_checkpoint_and_goes_on_elsewhere(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    import ray

    monkeypatch.setattr("metadist.distributed.draining.LOOK_EVERY_S", 0.0)
    config = load_config(CONFIG, ["training.steps=9", "evaluation.episodes=10"])

    def trainer(name: str, workers: int, *callbacks: Callback) -> MetaTrainer:
        scaling = ScalingSettings(num_workers=workers, backend=backend if workers else "actors")
        run = dataclasses.replace(config.run, name=name, storage_path=str(tmp_path))
        return MetaTrainer(config, scaling_config=scaling, run_config=run, callbacks=callbacks)

    with monkeypatch.context() as notice:

        class Notice(Callback):
            def on_step(self, step: int, metrics: dict[str, float], status: Any) -> None:
                if step == 4:
                    here = {ray.get_runtime_context().get_node_id(): 0}
                    notice.setattr(ray._private.state.state, "get_draining_nodes", lambda: here)

        with pytest.raises(InterruptedRun, match="after step 4 of 9; the checkpoint is written"):
            trainer("leaves", 1, Notice()).fit()
    assert trainer("leaves", 0).fit().theta_sha256 == trainer("stays", 0).fit().theta_sha256


@pytest.mark.ray
@pytest.mark.long
def test_an_adapter_leaves_a_node_that_is_about_to_be_taken_away_without_loss(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._raylet import GcsClient

    from metadist.distributed.ray_executor import RayExecutor

    monkeypatch.setattr("metadist.distributed.draining.LOOK_EVERY_S", 0.0)
    going = cluster.add_node(num_cpus=1)
    config = dataclasses.replace(load_config(CONFIG), scaling=ScalingSettings(num_workers=2))
    experiment, told = make_experiment(config), []
    executor = RayExecutor(experiment, config.outer, config.training.steps, config.scaling, notify=told.append)
    alone = InProcessExecutor(experiment, config.outer, config.training.steps)
    steps = itertools.count()

    def step() -> None:
        plan = plan_step(0, next(steps), 25, 13)
        theta = executor.publish()
        executor.step(plan, theta, executor.run(plan, theta))

    def nodes() -> set[str | None]:
        return {slot.node for slot in executor._slots if slot.starting is None}

    try:
        executor.start(None, None, lambda: False)
        step()
        assert going.node_id in nodes()
        # The learner stays beside the driver, whose node is the one that the run cannot do without.
        learner = ray._private.state.actors(executor._learner.actor._actor_id.hex())
        assert learner["Address"]["NodeID"] == ray.get_runtime_context().get_node_id()
        accepted, reason = GcsClient(address=cluster.address).drain_node(going.node_id, 2, "spot instance", 2**62)
        assert accepted, reason
        coming = cluster.add_node(num_cpus=1)
        # Both go on, until the new one is ready.
        wait_for(lambda: step() or coming.node_id in nodes())
        assert going.node_id not in nodes()
        assert executor.num_adapters == 2
        cluster.remove_node(going, allow_graceful=False)
        for _ in range(3):
            step()
        assert told == [f"Node {going.node_id} is about to be taken away: its adapter moves."]
        assert (executor.counters.adapters_lost, executor.counters.chunks_recomputed) == (0, 0)
        alone.start(None, None, lambda: False)
        for number in range(next(steps)):
            plan = plan_step(0, number, 25, 13)
            alone.step(plan, alone.publish(), alone.run(plan, alone.publish()))
        np.testing.assert_array_equal(executor.state().theta, alone.state().theta)
    finally:
        executor.close()
        alone.close()
