"""`python -m tests.chaos.sweep`: a sweep's driver is killed at random moments, and the sweep goes on by --resume."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

CONFIG = Path(__file__).parents[2] / "configs/sinusoid_maml.yaml"
POLL_S = 0.02
LONGEST_S = 1800
LATER_S = 0.5
"""A kill comes up to so long after the validation that it waits for."""
SCHEDULERS = {
    "asha": "{name: asha}\nsearcher: {name: tpe}\nbudget: {trials: 8, steps: 54, every: 2, max_concurrent: 1}",
    "hyperband": "{name: hyperband}\nbudget: {trials: 8, steps: 54, every: 2}",
    "pbt": "{name: pbt, perturb_every: 18}\nbudget: {trials: 4, steps: 54, every: 2}",
    "pb2": "{name: pb2, perturb_every: 18}\nbudget: {trials: 4, steps: 54, every: 2}",
}


@dataclass(frozen=True)
class Outcome:
    killed: int
    """How often the driver was killed before the sweep was done."""
    after: list[int]
    """How many validations there were in all, at each kill."""
    validations: int
    """Of the undisturbed sweep."""
    equal: bool
    """Whether the last table is that of the undisturbed sweep."""
    table: list[dict[str, Any]]


def killed_and_resumed(scheduler: str, times: int, seed: int, console: Console) -> Outcome:
    """Runs a sweep undisturbed, and once more with kills of its driver that are drawn from the seed."""
    with tempfile.TemporaryDirectory() as place:
        undisturbed, killed = (_Driven(Path(place) / name, scheduler) for name in ("undisturbed", "killed"))
        expected = undisturbed.table(resume=False)
        total = undisturbed.validations()
        random = np.random.default_rng(seed)
        after: list[int] = []
        for drawn in sorted(random.integers(0, total, times)):
            # A sweep that goes on shall come further than to its start, where nothing can be lost.
            moment = min(max(int(drawn), killed.validations() + bool(after)), total - 1)
            if killed.kill(moment, float(random.uniform(0, LATER_S)), resume=bool(after)):
                after.append(killed.validations())
                console.print(Text(f"{scheduler}: killed after {after[-1]} of {total} validations"))
        table = killed.table(resume=True)
        return Outcome(len(after), after, total, table == expected, table)


class _Driven:
    """A sweep in a directory of its own, run by `metadist tune`."""

    def __init__(self, folder: Path, scheduler: str) -> None:
        folder.mkdir()
        self._directory = folder / "sweep"
        path = folder / "mine.yaml"
        path.write_text(
            f"""\
base: {CONFIG}
overrides:
  scaling.num_workers: 0
  training.meta_batch_size: 4
  training.chunk_size: 2
  evaluation.val_episodes: 4
space:
  algorithm.inner_lr: loguniform(1e-3, 0.1)
  outer.lr: loguniform(1e-4, 0.1)
objective: {{metric: loss}}
scheduler: {SCHEDULERS[scheduler]}
run: {{storage_path: {folder}, name: sweep}}
"""
        )
        self._command = [sys.executable, "-m", "metadist", "tune", str(path), "--json"]

    def validations(self) -> int:
        """How many all trials have told so far."""
        # Not rglob, which also walks through checkpoints, while they are being removed.
        found = [path for depth in ("*", "*/*") for path in self._directory.glob(f"trials/{depth}/reports.json")]
        return sum(len(json.loads(reports.read_text())) for reports in found)

    def table(self, *, resume: bool) -> list[dict[str, Any]]:
        """The trials' rows after the sweep's end, which this waits for."""
        command = [*self._command, *(["--resume"] * resume)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S)
        if done.returncode:
            raise RuntimeError(done.stderr)
        rows: list[dict[str, Any]] = json.loads(done.stdout)["trials"]
        return rows

    def kill(self, validations: int, later_s: float, *, resume: bool) -> bool:
        """SIGKILL of the driver, and of nothing else, some time after so many validations; False where it had ended."""
        resumes = resume and (self._directory / "sweep.json").exists()
        process = subprocess.Popen(
            [*self._command, *(["--resume"] * resumes)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + LONGEST_S
        while process.poll() is None and self.validations() < validations:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {validations} validations in time")
            time.sleep(POLL_S)
        time.sleep(later_s)
        if process.poll() is not None:
            return False
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.sweep", description=__doc__)
    parser.add_argument("--scheduler", choices=list(SCHEDULERS), default="asha")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"HOME": home, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ |= {"RAY_worker_niceness": "0"}
        os.environ.pop("RAY_ADDRESS", None)
        outcome = killed_and_resumed(options.scheduler, options.times, options.seed, Console(stderr=True))
    sys.stdout.write(
        f"{options.scheduler}: killed {outcome.killed} times, after {', '.join(map(str, outcome.after))} of"
        f" {outcome.validations} validations; the same table: {'yes' if outcome.equal else 'no'}\n"
    )
    return 0 if outcome.equal and outcome.killed == options.times else 1


if __name__ == "__main__":
    sys.exit(main())
