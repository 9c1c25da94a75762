"""A run on a cluster that grows: Ray's own autoscaler, whose nodes are processes of this machine."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from metadist import Callback, MetaTrainer, ScalingSettings
from metadist.callbacks import Status
from metadist.distributed.placement import Node, check_fits
from metadist.errors import ClusterError, InterruptedRun
from metadist.jobs import JobServer
from tests.distributed.faulty import processes_named
from tests.distributed.test_jobs import free_ports, wait_for
from tests.distributed.test_same_bits import sinusoid

pytestmark = [pytest.mark.ray, pytest.mark.head]

HEAD_ID = "f" * 51 + "00000"
"""What the provider of nodes that are processes takes for the head's, whose type has a fixed name too."""
IDLE_MINUTES = 0.05


@dataclasses.dataclass(frozen=True)
class Growing:
    """A head without CPUs, to which up to three nodes with one CPU each may come."""

    address: str
    dashboard: str


def configuration(gcs_address: str) -> dict[str, Any]:
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    unused: dict[str, Any] = {
        name: [] for name in ("initialization_commands", "setup_commands", "cluster_synced_files")
    }
    unused |= {f"{node}_{kind}_commands": [] for node in ("head", "worker") for kind in ("setup", "start_ray")}
    unused |= {"docker": {}, "file_mounts": {}, "upscaling_speed": 1.0}
    return unused | {
        "cluster_name": "growing",
        "max_workers": 3,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            # By its module: the wheel lacks the defaults of its name.
            "type": "external",
            "module": provider,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": gcs_address,
        },
        "auth": {"ssh_user": "nobody"},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 10**8},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 3,
            },
        },
    }


@pytest.fixture(scope="module")
def growing(ray_home: dict[str, str]) -> Iterator[Growing]:
    import ray

    port, dashboard, client, agent = free_ports(4)
    address = f"{ray.util.get_node_ip_address()}:{port}"
    # Like ray.cluster_utils.AutoscalingCluster, which would end every Ray of this machine.
    autoscaler = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as temporary:
        config = Path(temporary) / "autoscaling.json"
        config.write_text(json.dumps(configuration(address)))
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=0"]
        command += [f"--autoscaling-config={config}", f"--temp-dir={temporary}", f"--port={port}"]
        command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        command += [f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats"]
        environment = ray_home | autoscaler
        head = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: head.poll() is not None or answers(f"http://127.0.0.1:{dashboard}"))
            assert head.poll() is None, "the head ended"
            ray.shutdown()
            ray.init(address=address, log_to_driver=False)
            yield Growing(address, f"http://127.0.0.1:{dashboard}")
            ray.shutdown()
        finally:
            started = [head.pid, *processes_named("", head.pid)]
            for pid in started:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.wait()


def answers(dashboard: str) -> bool:
    with suppress(ClusterError):
        JobServer(dashboard)
        return True
    return False


def alive() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


class StopsWithTwo(Callback):
    """Lets a run go on until it has had two adapters for three steps."""

    def __init__(self) -> None:
        self.adapters: list[int] = []
        self.nodes: list[int] = []

    def on_step(self, step: int, metrics: dict[str, float], status: Status) -> None:
        self.adapters.append(status.num_adapters)
        self.nodes.append(alive())
        if self.adapters.count(2) == 3:
            signal.raise_signal(signal.SIGINT)
        elif status.num_adapters < 2:
            time.sleep(0.05)  # The steps made while a node starts are made once more below.


def test_a_run_starts_on_an_empty_cluster_takes_in_nodes_up_to_its_max_and_gives_them_up(
    growing: Growing, tmp_path: Path
) -> None:
    assert alive() == 1
    config = sinusoid(tmp_path, steps=100_000)
    watched = StopsWithTwo()
    with pytest.raises(InterruptedRun):
        MetaTrainer(
            config,
            scaling_config=ScalingSettings(num_workers=(1, 2)),
            run_config=dataclasses.replace(config.run, name="grown"),
            callbacks=[watched],
        ).fit()
    # The head and two nodes, where three might have come.
    assert max(watched.nodes) == 3
    steps = len(watched.adapters)
    alone = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))
    MetaTrainer(
        alone,
        scaling_config=ScalingSettings(num_workers=0),
        run_config=dataclasses.replace(config.run, name="alone"),
    ).fit(evaluate=False)
    assert (tmp_path / "grown/metrics.jsonl").read_text() == (tmp_path / "alone/metrics.jsonl").read_text()
    wait_for(lambda: alive() == 1)


def test_a_submission_is_not_refused_for_want_of_nodes_that_may_come(growing: Growing, tmp_path: Path) -> None:
    config = dataclasses.replace(sinusoid(tmp_path), scaling=ScalingSettings(num_workers=3))
    JobServer(growing.dashboard).check_fits(config)
    with pytest.raises(ClusterError, match="room for 0"):
        check_fits(config.scaling, [Node({"CPU": 0.0})], lambda: False)
