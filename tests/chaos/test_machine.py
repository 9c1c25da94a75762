"""What the machines themselves do to a run: the head dies, the clock jumps, memory runs out, the disk is slow."""

import dataclasses
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from metadist import MetaTrainer, ScalingSettings, load_config
from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.keys import TaskKey
from metadist.run_directory import RunDirectory
from metadist.tasks.sinusoid import Sinusoid
from metadist.training import Result
from tests.distributed.test_interruption import CONFIG, checkpoint_exists, command, finish, hashes, start
from tests.distributed.test_jobs import BIN, free_ports

pytestmark = pytest.mark.chaos

WAIT_S = 180
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
GIB = 2**30
HOG_BYTES = 8 * GIB


@pytest.fixture
def undisturbed(tmp_path: Path) -> tuple[object, ...]:
    run_dir = tmp_path / "undisturbed"
    return hashes(finish(command(run_dir, 0), dict(os.environ)), run_dir)


@pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime (Debian's package of that name)")
def test_a_clock_that_jumps_back_and_ahead_costs_no_bit(tmp_path: Path, undisturbed: tuple[object, ...]) -> None:
    # Of this process alone: Ray's own do not start under libfaketime, which breaks their waiting.
    clock, run_dir = tmp_path / "clock", tmp_path / "run"
    clock.write_text("+0")
    # The clock that counts from the boot goes on as ever, as it does where an administrator sets the other one.
    faked = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    faked |= {"FAKETIME_NO_CACHE": "1"}
    process = start(command(run_dir, 0), dict(os.environ) | faked, checkpoint_exists(run_dir))
    for jump in ("-3d", "+400d"):
        clock.write_text(jump)
        time.sleep(1.0)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert hashes(finish(command(run_dir, 0), dict(os.environ)), run_dir) == undisturbed


@contextmanager
def a_head(port: int) -> Iterator[subprocess.Popen]:
    """A cluster of one node with two CPUs, in a process group of its own."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as temporary:
        ports = [f"--{name}={free}" for name, free in zip(OTHER_PORTS, free_ports(len(OTHER_PORTS)), strict=True)]
        options = ["--head", "--block", "--num-cpus=2", f"--port={port}", f"--temp-dir={temporary}", *ports]
        head = subprocess.Popen(
            [str(BIN / "ray"), "start", "--disable-usage-stats", "--include-dashboard=false", *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + WAIT_S
            while subprocess.run(
                [str(BIN / "ray"), "status", f"--address=127.0.0.1:{port}"], capture_output=True
            ).returncode:
                assert head.poll() is None
                assert time.monotonic() < deadline
            yield head
        finally:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


OTHER_PORTS = ["ray-client-server-port", "dashboard-agent-listen-port"]


def test_a_run_whose_head_dies_ends_with_a_message_and_goes_on_on_another(
    tmp_path: Path, undisturbed: tuple[object, ...]
) -> None:
    run_dir, (port,) = tmp_path / "run", free_ports(1)
    train = [*command(run_dir, 2), "--address", f"127.0.0.1:{port}"]
    with a_head(port):
        process = start(train, dict(os.environ), checkpoint_exists(run_dir))
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    with a_head(port):
        assert hashes(finish(train, dict(os.environ)), run_dir) == undisturbed


@dataclass(frozen=True)
class Greedy:
    """Sinusoids; the first process that samples a task of `step` takes memory until it is killed for it."""

    step: int
    marker: Path

    @property
    def spec(self) -> EpisodeSpec:
        return Sinusoid().spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        if keys[0].step == self.step and keys[0].split == "train":
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                return Sinusoid().sample(keys)
            self.marker.write_text(str(os.getpid()))
            kept = bytearray(os.urandom(2**20) * (HOG_BYTES // 2**20))
            time.sleep(WAIT_S)
            del kept
        return Sinusoid().sample(keys)


def fit(tmp_path: Path, workers: int, name: str, **replaced: Any) -> Result:
    config = load_config(CONFIG, ["training.steps=12", f"run.storage_path={tmp_path}", f"run.name={name}"])
    config = dataclasses.replace(config, scaling=ScalingSettings(num_workers=workers), **replaced)
    return MetaTrainer(config).fit(evaluate=False)


def bits(result: Result) -> tuple[str, str]:
    return result.theta_sha256, result.optimizer_sha256


@pytest.fixture
def watched_memory() -> Iterator[None]:
    """A local Ray that kills a worker where the machine uses half of HOG_BYTES more than it does now."""
    import ray
    from ray._private.utils import get_system_memory, get_used_memory

    share = (get_used_memory() + HOG_BYTES / 2) / get_system_memory()
    if share > 0.9:
        pytest.skip(f"needs {HOG_BYTES / GIB:g} GiB of free memory")
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"memory_usage_threshold": share, "memory_monitor_refresh_ms": 100},
    )
    yield
    ray.shutdown()


def test_an_adapter_that_is_killed_for_its_memory_is_replaced_and_costs_no_bit(
    watched_memory: None, tmp_path: Path
) -> None:
    source = Greedy(step=6, marker=tmp_path / "greedy")
    disturbed = fit(tmp_path, 1, "disturbed", task=source)
    assert not Path(f"/proc/{source.marker.read_text()}").exists()
    assert disturbed.adapters_lost >= 1
    assert bits(disturbed) == bits(fit(tmp_path, 0, "alone"))


def test_a_disk_that_is_slow_while_a_checkpoint_is_written_costs_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = fit(tmp_path, 0, "undisturbed")
    write: Callable[..., None] = RunDirectory._write

    def slow(*arguments: Any) -> None:
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(RunDirectory, "_write", slow)
    assert bits(fit(tmp_path, 2, "disturbed")) == bits(undisturbed)
