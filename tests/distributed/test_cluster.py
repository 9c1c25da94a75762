"""Runs on a cluster of several nodes: too small, growing, shrinking, asking for a token."""

import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metadist import MetaTrainer, load_config
from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.keys import TaskKey
from metadist.distributed.placement import check_fits
from metadist.errors import ClusterError
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


@pytest.fixture(scope="module")
def cluster(ray_home: dict[str, str]) -> Iterator[Any]:
    """A cluster whose head has one CPU."""
    import ray
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=started.address, log_to_driver=False)
    yield started
    ray.shutdown()
    started.shutdown()


def fit(tmp_path: Path, workers: int | tuple[int, int], name: str, steps: int, **replaced: Any) -> Result:
    config = load_config(CONFIG, [f"training.steps={steps}", "evaluation.episodes=10"])
    return MetaTrainer(
        dataclasses.replace(config, **replaced),
        scaling_config=ScalingSettings(num_workers=workers),
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
    nodes = [{"CPU": 3.0}, {"CPU": 3.0}]
    with pytest.raises(ClusterError, match="room for 2"):
        check_fits(scaling, nodes, autoscaling=False)
    check_fits(scaling, [*nodes, {"CPU": 2.0}], autoscaling=False)
    check_fits(scaling, nodes, autoscaling=True)
    with pytest.raises(ClusterError, match="GPU 1 each"):
        check_fits(ScalingSettings(num_workers=1, use_gpu=True), nodes, autoscaling=False)


@pytest.mark.ray
def test_big_arrays_of_a_source_are_shared_by_the_adapters_of_a_node(cluster: Any, tmp_path: Path) -> None:
    assert fit(tmp_path, 1, "shared", 2, task=SharesItsData()).step == 2


@pytest.mark.ray
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
def test_a_cluster_that_asks_for_a_token_refuses_with_what_to_set_and_takes_those_who_have_it(
    ray_home: dict[str, str], tmp_path: Path
) -> None:
    port = "6391"
    token = {**ray_home, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
    bin_dir = Path(sys.executable).parent
    # With --block, so that ending this one process ends this head and no other Ray of the machine.
    head = [str(bin_dir / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=1"]
    # A short path: Ray's sockets lie there, and their names may have 107 characters.
    temporary = tempfile.TemporaryDirectory(prefix="ray")
    head += ["--include-dashboard=false", f"--temp-dir={temporary.name}"]
    train = [sys.executable, "-m", "metadist", "train", str(CONFIG), "--workers", "1"]
    train += ["--set", "training.steps=3", "--no-evaluate"]
    train += ["--run-dir", str(tmp_path / "run"), "--address", f"127.0.0.1:{port}"]
    with temporary, subprocess.Popen(head, env=token, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            wait_for(lambda: running.poll() is not None or _answers(int(port)))
            assert running.poll() is None, "the head ended"
            refused = subprocess.run(train, env=ray_home, capture_output=True, text=True, timeout=WAIT_S)
            assert refused.returncode == 2, refused.stderr
            assert "RAY_AUTH_MODE=token" in refused.stderr
            assert "Traceback" not in refused.stderr
            taken = subprocess.run(train, env=token, capture_output=True, text=True, timeout=WAIT_S)
            assert taken.returncode == 0, taken.stderr
        finally:
            running.terminate()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
