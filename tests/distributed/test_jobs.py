"""A user's own project as Ray jobs, on a cluster of three nodes that asks for a token."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from metadist import MetaTrainer, load_config
from metadist.training import Result
from tests.distributed.faulty import processes_named

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef0123456789abcdef"
SETS = ["training.steps=5", "evaluation.episodes=10"]
WAIT_S = 240
pytestmark = [pytest.mark.ray, pytest.mark.head]


@dataclass(frozen=True)
class Head:
    """A cluster of a head without CPUs and two nodes with one each, and a user's project directory beside it."""

    address: str
    """Of its dashboard."""
    gcs_address: str
    workers: list[subprocess.Popen]
    """The `ray start` of each node other than the head."""
    project: Path
    environment: dict[str, str]
    """Of a user who has no token."""
    temporary: Path
    """Where Ray keeps its own files."""

    def run(self, *command: str, token: bool = True) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.project, env=self.env(token), capture_output=True, text=True, timeout=WAIT_S
        )

    def env(self, token: bool = True) -> dict[str, str]:
        return self.environment | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN} if token else {})

    def submit(self, *more: str) -> list[str]:
        sets = [part for assignment in SETS for part in ("--set", assignment)]
        return [
            *[sys.executable, "-m", "metadist", "submit", "experiment.yaml", *sets],
            *["--workers", "1", "--address", self.address, *more],
        ]


@pytest.fixture(scope="module")
def head(ray_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    project = tmp_path_factory.mktemp("parent") / "project"
    shutil.copytree(ROOT / "examples/own_project", project, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    (project / "data").mkdir()
    (project / "data/big.bin").write_bytes(b"not for the cluster")
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environment = {**ray_home, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "127.0.0.1:1"}
    head_port, dashboard, client, *agents = free_ports(6)
    # A short path: Ray's sockets lie there, and their names may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as temporary, ExitStack() as running:
        gcs_address = f"127.0.0.1:{head_port}"
        head = Head(f"http://127.0.0.1:{dashboard}", gcs_address, [], project, environment, Path(temporary))
        env = {name: value for name, value in head.env().items() if name != "RAY_ADDRESS"}

        def start(*options: str) -> subprocess.Popen:
            # With --block, so that ending this one process ends this node and no other Ray of the machine.
            command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *options]
            command.append(f"--dashboard-agent-listen-port={agents.pop()}")
            node = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            running.enter_context(node)
            running.callback(node.terminate)
            return node

        ports = [f"--port={head_port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        first = start("--head", "--num-cpus=0", f"--temp-dir={temporary}", *ports)
        # One after another: nodes that start on one machine at once would choose the same ports.
        for number in (1, 2, 3):
            wait_for(lambda number=number: first.poll() is not None or nodes_of(head) == number)
            assert first.poll() is None, "the head ended"
            if number < 3:
                head.workers.append(start("--num-cpus=1", f"--address={gcs_address}"))
        yield head


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def nodes_of(head: Head) -> int:
    """How many nodes the dashboard knows, once its job server answers; 0 before."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    try:
        answers = [
            requests.get(f"{head.address}/api/{name}", headers=headers, timeout=10) for name in ("jobs/", "v0/nodes")
        ]
        return len(answers[1].json()["data"]["result"]["result"]) if all(answer.ok for answer in answers) else 0
    except (requests.RequestException, KeyError, TypeError, ValueError):
        return 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def locally(head: Head, run_dir: Path, *sets: str) -> Result:
    """The same run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(head.project)
        parts = [f"run.storage_path={run_dir.parent}", f"run.name={run_dir.name}", "scaling.num_workers=0"]
        return MetaTrainer(load_config("experiment.yaml", [*SETS, *sets, *parts])).fit(evaluate=False)


def theta_in(log: str) -> str:
    (found,) = re.findall(r"^theta +sha256 ([0-9a-f]{64})$", log, re.MULTILINE)
    return found


def test_a_project_submitted_from_its_directory_has_the_bits_of_a_local_run_and_submitted_again_goes_on(
    head: Head, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    done = head.run(*head.submit("--run-dir", str(run_dir), "--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["run_dir"], result["status"], result["exit_status"]) == (str(run_dir), "SUCCEEDED", 0)
    assert f"job            {result['job_id']}\nrun directory  {run_dir}\n" in done.stderr
    local_theta = locally(head, tmp_path / "local").theta_sha256
    assert theta_in(done.stderr) == local_theta
    assert "name: sign_maml" in (run_dir / "config.yaml").read_text()
    assert {"config.yaml", "metrics.jsonl", "evaluation.json", "checkpoints"} <= {p.name for p in run_dir.iterdir()}
    assert not (run_dir / "lease.json").exists()
    again = head.run(*head.submit("--run-dir", str(run_dir), "--workers", "0", "--no-evaluate"))
    assert again.returncode == 0, again.stderr
    assert "Going on from step 5" in again.stderr
    assert theta_in(again.stderr) == local_theta
    details = job_details(head)
    assert TOKEN not in details + done.stdout + done.stderr + "".join(texts_below(run_dir))
    # The project alone: neither its data nor metadist's source.
    packed = {path.name for path in head.temporary.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/*")}
    assert packed - {"__pycache__"} == {path.name for path in (ROOT / "examples/own_project").glob("*.*")}


def test_without_the_token_it_is_refused_with_what_to_set(head: Head, tmp_path: Path) -> None:
    done = head.run(*head.submit("--run-dir", str(tmp_path / "run")), token=False)
    assert done.returncode == 2, done.stderr
    assert "Set RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_run_that_joins_the_cluster_itself_needs_the_token_too(head: Head, tmp_path: Path) -> None:
    train = [sys.executable, "-m", "metadist", "train", "experiment.yaml", "--workers", "1", "--no-evaluate"]
    train += ["--set", "training.steps=3", "--run-dir", str(tmp_path / "run"), "--address", head.gcs_address]
    refused = head.run(*train, token=False)
    assert refused.returncode == 2, refused.stderr
    assert "RAY_AUTH_MODE=token" in refused.stderr
    assert "Traceback" not in refused.stderr
    taken = head.run(*train)
    assert taken.returncode == 0, taken.stderr


def test_more_adapters_than_the_cluster_holds_are_refused_before_anything_is_sent(head: Head, tmp_path: Path) -> None:
    before = job_details(head)
    done = head.run(*head.submit("--run-dir", str(tmp_path / "run"), "--workers", "9"))
    assert done.returncode == 2, done.stderr
    assert "9 adapters of CPU 1 each do not fit the cluster, which has CPU 2 on 3 nodes: room for 2" in done.stderr
    assert job_details(head) == before


def test_a_job_that_fails_ends_the_command_with_its_own_status(head: Head, tmp_path: Path) -> None:
    # Refused by the job itself, since only the cluster knows that there is nothing to go on from.
    done = head.run(*head.submit("--run-dir", str(tmp_path / "run"), "--resume", "must", "--json"))
    assert done.returncode == 2, done.stderr
    assert json.loads(done.stdout)["status"] == "FAILED"
    assert "no checkpoint to go on from" in done.stderr


def test_ctrl_c_leaves_the_job_running_and_the_printed_commands_attach_and_stop(head: Head, tmp_path: Path) -> None:
    command = head.submit("--run-dir", str(tmp_path / "run"), "--workers", "0", "--set", "training.steps=1000000")
    process = subprocess.Popen(
        command,
        cwd=head.project,
        env=head.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # As at a terminal: what a shell starts in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: process.poll() is not None or (tmp_path / "run/metrics.jsonl").exists())
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    job = re.search(r"^job +(\S+)$", output, re.MULTILINE)[1]
    attach = f"attach again   ray job logs -f {job} --address {head.address}"
    stop = f"stop           ray job stop {job} --address {head.address}"
    assert f"{attach}\n{stop}" in errors
    assert status_of(head, job) == "RUNNING"
    stop_as_printed(head, stop, job)


@pytest.mark.long
def test_no_wait_returns_at_once_and_a_second_job_on_the_same_run_directory_is_refused(
    head: Head, tmp_path: Path
) -> None:
    same = ["--run-dir", str(tmp_path / "run"), "--workers", "0", "--set", "training.steps=1000000"]
    first = head.run(*head.submit(*same, "--no-wait", "--skip-resource-check"))
    assert first.returncode == 0, first.stderr
    job = re.search(r"^job +(\S+)$", first.stdout, re.MULTILINE)[1]
    wait_for((tmp_path / "run/metrics.jsonl").exists)
    assert status_of(head, job) == "RUNNING"
    second = head.run(*head.submit(*same))
    assert second.returncode == 2, second.stderr
    assert "trains in this run directory" in " ".join(second.stderr.split())
    assert status_of(head, job) == "RUNNING"
    stop_as_printed(head, re.search("^stop .*$", first.stdout, re.MULTILINE)[0], job)


def stop_as_printed(head: Head, line: str, job: str) -> None:
    # The variable would overrule the address that was printed.
    environment = {name: value for name, value in head.env().items() if name != "RAY_ADDRESS"}
    subprocess.run(line.split()[1:], env=environment, check=True, capture_output=True, timeout=WAIT_S)
    wait_for(lambda: status_of(head, job) == "STOPPED")


@pytest.mark.long
def test_a_node_that_is_killed_in_mid_run_costs_no_bit(head: Head, tmp_path: Path) -> None:
    """Submitted with `ray job submit`. The last test here, since the cluster is smaller after it."""
    run_dir, more = tmp_path / "run", ["training.steps=300", "run.checkpoint_config.checkpoint_frequency=10"]
    train = ["python", "-m", "metadist", "train", "experiment.yaml", "--workers", "2", "--run-dir", str(run_dir)]
    train += [part for assignment in [*SETS, *more] for part in ("--set", assignment)]
    process = subprocess.Popen(
        [str(BIN / "ray"), "job", "submit", "--working-dir", ".", "--", *train],
        cwd=head.project,
        env=head.env() | {"RAY_ADDRESS": head.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def adapters_at(node: subprocess.Popen) -> list[int]:
        return processes_named("ray::AdapterActor", node.pid)

    def may_strike() -> bool:
        # One adapter on each node, and something done by them.
        at_work = all(map(adapters_at, head.workers)) and any(run_dir.glob("checkpoints/step_*/manifest.json"))
        return at_work or process.poll() is not None

    wait_for(may_strike)
    victim = head.workers[0]
    for pid in [victim.pid, *processes_named("", victim.pid)]:
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output
    # Ray may put the replacement on that node too, until it knows that the node is gone.
    assert re.search(r", [1-9]\d* adapters lost, ", output), output
    local = locally(head, tmp_path / "local", *more)
    assert theta_in(output) == local.theta_sha256
    assert (run_dir / "metrics.jsonl").read_text() == (tmp_path / "local/metrics.jsonl").read_text()
    assert {"evaluation.json", "fingerprint.json", "timeline.jsonl"} <= {path.name for path in run_dir.iterdir()}
    assert (run_dir / "checkpoints/step_00000300/manifest.json").exists()


def job_details(head: Head) -> str:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    jobs = requests.get(f"{head.address}/api/jobs/", headers=headers, timeout=30).json()
    return json.dumps([job for job in jobs if job["submission_id"]])


def status_of(head: Head, job: str) -> str:
    (found,) = [details for details in json.loads(job_details(head)) if details["submission_id"] == job]
    return found["status"]


def texts_below(directory: Path) -> list[str]:
    return [path.read_text(errors="ignore") for path in directory.rglob("*") if path.is_file()]
