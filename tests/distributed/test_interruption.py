"""A run that is interrupted or killed goes on with equal bits, through the command line as a user would do it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "configs/sinusoid_maml.yaml"
STEPS = 600
WAIT_S = 400
pytestmark = [pytest.mark.ray, pytest.mark.head]


def command(run_dir: Path, workers: int) -> list[str]:
    overrides = [f"training.steps={STEPS}", "evaluation.episodes=10", "run.checkpoint_config.checkpoint_frequency=20"]
    sets = [part for override in [*overrides, "run.log_every=1"] for part in ("--set", override)]
    return [*program(), "train", str(CONFIG), *sets, "--run-dir", str(run_dir), "--workers", str(workers)]


def program() -> list[str]:
    return [sys.executable, "-m", "metadist"]


def finish(arguments: list[str], environment: dict[str, str]) -> dict[str, object]:
    """Runs a `train` command to its end; gives its JSON object."""
    done = subprocess.run([*arguments, "--json"], env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def start(arguments: list[str], environment: dict[str, str], until: Callable[[], bool]) -> subprocess.Popen[str]:
    """Starts a `train` command in a process group of its own, as a terminal does, and waits for `until`."""
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + WAIT_S
    while not until():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run made no checkpoint in time"
        time.sleep(0.02)
    return process


def group(leader: int) -> list[int]:
    """The processes of a group."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,pgid="], capture_output=True, text=True, check=True).stdout
    return [int(pid) for pid, of in map(str.split, listed.splitlines()) if int(of) == leader]


def checkpoint_exists(run_dir: Path) -> Callable[[], bool]:
    return lambda: any(run_dir.glob("checkpoints/step_*/manifest.json"))


def hashes(result: dict[str, object], run_dir: Path) -> tuple[object, ...]:
    return result["theta_sha256"], result["optimizer_sha256"], (run_dir / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def undisturbed(ray_home: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    return hashes(finish(command(run_dir, 0), ray_home), run_dir)


@pytest.mark.parametrize(
    ("workers", "asks"), [pytest.param(0, signal.SIGINT, marks=pytest.mark.long), (2, signal.SIGTERM)]
)
def test_ctrl_c_or_a_notice_of_preemption_ends_with_a_checkpoint_and_the_printed_command_goes_on_with_equal_bits(
    ray_home: dict[str, str], tmp_path: Path, undisturbed: tuple[object, ...], workers: int, asks: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    process = start(command(run_dir, workers), ray_home, checkpoint_exists(run_dir))
    # A terminal and `timeout` tell the whole group. Ray's GCS, were it in there, would end before the checkpoint.
    assert group(process.pid) == [process.pid]
    os.killpg(process.pid, asks)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    resume = shlex.split(errors.strip().splitlines()[-1])
    assert resume[:2] == ["metadist", "train"]
    stopped_at = int(errors.split("Interrupted after step ")[1].split()[0])
    assert 0 < stopped_at < STEPS
    assert (run_dir / f"checkpoints/step_{stopped_at:08d}/manifest.json").exists()
    assert hashes(finish([*program(), *resume[1:]], ray_home), run_dir) == undisturbed


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_killed_outright_goes_on_in_one_process_from_its_last_checkpoint_with_equal_bits(
    ray_home: dict[str, str], tmp_path: Path, undisturbed: tuple[object, ...], workers: int
) -> None:
    run_dir = tmp_path / "run"
    process = start(command(run_dir, workers), ray_home, checkpoint_exists(run_dir))
    process.kill()
    process.communicate()
    assert hashes(finish(command(run_dir, 0), ray_home), run_dir) == undisturbed
