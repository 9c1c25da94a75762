"""A run over three hosts whose network fails in every way that networks do."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.hosts import PORT, Hosts, why_not

CONFIG = Path(__file__).parents[2] / "configs/sinusoid_maml.yaml"
STEPS, EVERY = 400, 10
WAIT_S = 300
UNPLUGGED_S = 3.0
pytestmark = pytest.mark.chaos


def train(run_dir: Path, *arguments: str) -> list[str]:
    overrides = [f"training.steps={STEPS}", f"run.checkpoint_config.checkpoint_frequency={EVERY}"]
    overrides += ["run.checkpoint_config.num_to_keep=100", "training.chunk_size=2", "run.log_every=1"]
    sets = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "metadist", "train", str(CONFIG), *sets, "--run-dir", str(run_dir)]
    return [*command, "--no-evaluate", "--json", *arguments]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_broken_a_lossy_and_a_slow_network_cost_no_bit(tmp_path: Path) -> None:
    if (missing := why_not()) is not None:
        pytest.skip(missing)
    home = tmp_path / "home"
    home.mkdir()
    # Hosts elsewhere are used with a token alone.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef", "HOME": str(home)}
    environment = os.environ | token | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    environment.pop("RAY_ADDRESS", None)
    hosts, run = Hosts(environment), tmp_path / "run"

    def saved(step: int) -> Callable[[], bool]:
        return lambda: (run / f"checkpoints/step_{step:08d}/manifest.json").exists()

    with hosts.up(3):
        command = train(run, "--workers", "3", "--address", f"{hosts.address(1)}:{PORT}")
        process = subprocess.Popen(
            hosts.command(1, *command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            wait_for(saved(10), process)
            hosts.switch.unplugged.add(2)
            time.sleep(UNPLUGGED_S)
            hosts.switch.unplugged.remove(2)
            wait_for(saved(20), process)
            hosts.switch.loss[3] = 0.05
            lost = hosts.switch.lost
            wait_for(lambda: hosts.switch.lost >= lost + 5, process)
            hosts.switch.delay_s[3] = 0.2
            wait_for(lambda: hosts.switch.delayed >= 50, process)
            hosts.switch.loss.clear()
            hosts.switch.delay_s.clear()
            output, errors = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    alone = subprocess.run(train(tmp_path / "alone", "--workers", "0"), env=environment, capture_output=True, text=True)
    found, expected = json.loads(output), json.loads(alone.stdout)
    for name in ("theta_sha256", "optimizer_sha256", "train"):
        assert found[name] == expected[name]
    metrics = [(place / "metrics.jsonl").read_text() for place in (run, tmp_path / "alone")]
    assert metrics[0] == metrics[1]
