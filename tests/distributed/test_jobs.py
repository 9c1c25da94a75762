"""Training as a job of a cluster with token authentication: submitted as a user would do it."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from metadist import MetaTrainer, load_config

TOKEN = "0123456789abcdef" * 4
WAIT_S = 180
CONFIG = Path(__file__).parents[2] / "configs/sinusoid_maml.yaml"
METADIST = [sys.executable, "-m", "metadist"]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
STEPS = 1200
OVERRIDES = (
    f"training.steps={STEPS}",
    "evaluation.episodes=10",
    "run.checkpoint_config.checkpoint_frequency=20",
    "scaling.placement_strategy=SPREAD",
)
SETS = [part for override in OVERRIDES for part in ("--set", override)]

SCRIPT = """
import sys

from metadist import Config, MetaTrainer, RunSettings, ScalingSettings, TrainingSettings
from metadist.models import MLP
from tasks_of_mine import Lines, SignMAML

config = Config(
    task=Lines(),
    model=MLP(hidden=(8,)),
    algorithm=SignMAML(inner_lr=0.01),
    training=TrainingSettings(steps=5, meta_batch_size=8),
    scaling=ScalingSettings(num_workers=int(sys.argv[2])),
    run=RunSettings(storage_path=sys.argv[1], name="mine"),
)
print("theta", MetaTrainer(config).fit(evaluate=False).theta_sha256)
"""
TASKS_OF_MINE = """
import numpy as np
import torch

from metadist import Algorithm, EpisodeBatch, EpisodeSpec, Examples, generator, settings


class Lines:
    spec = EpisodeSpec(kind="regression", input_shape=(1,), output_size=1, support_size=5, query_size=10)

    def sample(self, keys):
        u = torch.tensor(np.stack([generator(key).random(17) for key in keys]), dtype=torch.float32)
        x = 2 * u[:, 2:, None] - 1
        y = u[:, 0, None, None] * x + u[:, 1, None, None]
        return EpisodeBatch(Examples(x[:, :5], y[:, :5]), Examples(x[:, 5:], y[:, 5:]))


@settings
class SignMAML(Algorithm):
    inner_lr: float = 0.01
    inner_steps: int = 2

    def adapt(self, network, meta, support, num_steps):
        phi = dict(meta)
        for _ in range(num_steps):
            grads = torch.func.grad(lambda p: network.loss(p, support))(phi)
            phi = {name: value - self.inner_lr * torch.sign(grads[name]) for name, value in phi.items()}
        return phi
"""


@dataclass
class ThreeNodes:
    address: str
    environment: dict[str, str]
    process: subprocess.Popen[str]

    def run(self, *command: str, project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        values = self.environment | environment
        return subprocess.run(command, cwd=project, env=values, capture_output=True, text=True, timeout=WAIT_S)

    def kill_a_node(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print("kill", file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "killed\n"


@pytest.fixture(scope="module")
def cluster(ray_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeNodes]:
    environment = ray_home | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    log = tmp_path_factory.mktemp("cluster") / "log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("three_nodes.py"))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, log.read_text()
        yield ThreeNodes(address, environment, process)
    finally:
        process.stdin.close()
        process.wait(WAIT_S)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's directory: a config, and what must not be packed."""
    directory = tmp_path / "project"
    directory.mkdir()
    shutil.copy(CONFIG, directory)
    (directory / "data").mkdir()
    (directory / "data/big").write_bytes(b"x")
    (directory / ".venv").mkdir()
    return directory


@pytest.fixture(scope="module")
def theta_in_process(tmp_path_factory: pytest.TempPathFactory) -> str:
    overrides = [*OVERRIDES, "scaling.num_workers=0", f"run.storage_path={tmp_path_factory.mktemp('local')}"]
    return MetaTrainer(load_config(CONFIG, overrides)).fit(evaluate=False).theta_sha256


def assert_complete(run_dir: Path, theta_sha256: str, log: str) -> None:
    assert f"theta          sha256 {theta_sha256}" in log
    for name in ("config.yaml", "fingerprint.json", "evaluation.json", "training.png"):
        assert (run_dir / name).is_file(), name
    assert (run_dir / f"checkpoints/step_{STEPS:08d}/manifest.json").is_file()
    assert json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == STEPS
    assert not (run_dir / "lease.json").exists()
    holders = [path for path in run_dir.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in log
    assert not holders


@pytest.mark.ray
def test_ray_job_submit_as_it_stands(cluster: ThreeNodes, project: Path, tmp_path: Path, theta_in_process: str) -> None:
    train = ["python", "-m", "metadist", "train", CONFIG.name, *SETS, "--run-dir", str(tmp_path / "runs/plain")]
    submit = [*RAY, "job", "submit", "--address", cluster.address, "--working-dir", ".", "--"]
    done = cluster.run(*submit, *train, "--workers", "2", project=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_complete(tmp_path / "runs/plain", theta_in_process, done.stdout + done.stderr)


@pytest.mark.ray
def test_a_users_own_project_without_metadist_in_it(cluster: ThreeNodes, project: Path, tmp_path: Path) -> None:
    (project / "train_mine.py").write_text(SCRIPT)
    (project / "tasks_of_mine.py").write_text(TASKS_OF_MINE)
    here = cluster.run(sys.executable, "train_mine.py", str(tmp_path / "here"), "0", project=project)
    assert here.returncode == 0, here.stderr
    submit = [*RAY, "job", "submit", "--address", cluster.address, "--working-dir", ".", "--"]
    there = cluster.run(*submit, "python", "train_mine.py", str(tmp_path / "there"), "2", project=project)
    assert there.returncode == 0, there.stdout + there.stderr
    assert here.stdout.strip().startswith("theta ")
    assert here.stdout.strip() in there.stdout


@pytest.mark.ray
@pytest.mark.parametrize(("token", "says"), [("", "none is given"), ("f" * 64, "not right")])
def test_without_the_right_token_the_message_says_what_to_set(
    cluster: ThreeNodes, project: Path, tmp_path: Path, token: str, says: str
) -> None:
    values = {"RAY_AUTH_TOKEN": token, "RAY_AUTH_MODE": "token" if token else "disabled"}
    submit = [*METADIST, "submit", CONFIG.name, "--address", cluster.address, "--run-dir", str(tmp_path / "runs/no")]
    done = cluster.run(*submit, project=project, **values)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
def test_more_adapters_than_the_cluster_has_room_for(cluster: ThreeNodes, project: Path, tmp_path: Path) -> None:
    submit = [*METADIST, "submit", CONFIG.name, "--address", cluster.address, "--run-dir", str(tmp_path / "runs/big")]
    done = cluster.run(*submit, "--workers", "9", project=project)
    assert done.returncode == 2, done.stderr
    assert "9 adapters" in done.stderr
    assert "room for 3" in done.stderr


@pytest.mark.ray
def test_metadist_submit_and_a_node_killed_in_mid_run(
    cluster: ThreeNodes, project: Path, tmp_path: Path, theta_in_process: str
) -> None:
    run_dir = tmp_path / "runs/killed"

    def kill() -> None:
        deadline = time.monotonic() + WAIT_S
        while not any(run_dir.glob("checkpoints/step_*/manifest.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        cluster.kill_a_node()

    killer = threading.Thread(target=kill)
    killer.start()
    submit = [*METADIST, "submit", CONFIG.name, "--address", cluster.address, "--run-dir", str(run_dir), *SETS]
    done = cluster.run(*submit, "--workers", "1:3", "--json", project=project)
    killer.join()
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "SUCCEEDED"
    assert result["run_dir"] == str(run_dir)
    assert_complete(run_dir, theta_in_process, done.stderr)
    assert "adapters lost" in done.stderr
    shown = cluster.run(*RAY, "job", "list", "--address", cluster.address, project=project)
    assert result["submission_id"] in shown.stdout
    assert TOKEN not in shown.stdout


def submit_here(project: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*METADIST, "submit", CONFIG.name, "--address", "http://127.0.0.1:1", *options]
    values = os.environ | environment
    return subprocess.run(command, cwd=project, env=values, capture_output=True, text=True, timeout=WAIT_S)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "run.storage_path must be absolute"),
        (("--run-dir", "/tmp/runs/x"), "nothing answers"),
        (("--run-dir", "/tmp/runs/x", "--address", "127.0.0.1:8265"), "must be the http://"),
        (("--run-dir", "/tmp/runs/x", "--address", "http://me:secret@127.0.0.1:1"), "user name or password"),
        (("--run-dir", f"/tmp/runs/{TOKEN}"), "holds the cluster's token"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(project: Path, options: tuple[str, ...], says: str) -> None:
    done = submit_here(project, *options, RAY_AUTH_TOKEN=TOKEN)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
    assert "secret" not in done.stderr
