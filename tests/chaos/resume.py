"""`python -m tests.chaos.resume`: a run is killed at random moments, and each time the same command goes on with it."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from metadist import MetaTrainer, load_config
from metadist.config import Config
from metadist.training import Result

CONFIG = Path(__file__).parents[2] / "configs/sinusoid_maml.yaml"
STEPS, CHECKPOINT_EVERY = 300, 7
STEPS_ON_RAY = 1000
"""So that training, and not the start of Ray, is most of a run's life."""


@dataclass(frozen=True)
class Outcome:
    times: int
    killed: int
    """How often the signal came before the run was done."""
    equal: int
    """Of those, how often hashes and metrics were the undisturbed run's after the resume."""
    at_steps: list[int]
    """The checkpoint that each resume went on from; 0 where there was none yet."""


def killed_and_resumed(times: int, seed: int, workers: int = 0) -> Outcome:
    """Kills as many runs, each once with SIGKILL at a random moment of its life, and resumes each.

    With `workers` each is the driver of so many adapters on a local Ray of its own, which ends with it.
    """
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as place:
        undisturbed = _config(place, "undisturbed", workers)
        began = time.monotonic()
        _wait(_begin(undisturbed))
        life = time.monotonic() - began
        expected = _result(undisturbed)
        at_steps: list[int] = []
        equal = 0
        while len(at_steps) < times:
            config = _config(place, f"killed_{len(at_steps)}", workers)
            process = _begin(config)
            time.sleep(random.uniform(0, life))
            process.kill()
            process.join()
            if process.exitcode != -signal.SIGKILL:
                _move_away(config)
                continue
            at_steps.append(_last_checkpoint(config))
            _wait(_begin(config))
            equal += _result(config) == expected
        return Outcome(times, len(at_steps), equal, at_steps)


def _config(place: str, name: str, workers: int) -> Config:
    steps = STEPS_ON_RAY if workers else STEPS
    overrides = [f"training.steps={steps}", "run.log_every=1", "evaluation.episodes=20", f"run.storage_path={place}"]
    overrides += [f"run.checkpoint_config.checkpoint_frequency={CHECKPOINT_EVERY}", f"scaling.num_workers={workers}"]
    config = load_config(CONFIG, overrides)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))


def _begin(config: Config) -> multiprocessing.process.BaseProcess:
    # Forked, so that it begins at once: most of a run's first seconds are imports, and nothing can be lost in them.
    process = multiprocessing.get_context("fork").Process(target=_train, args=(config,))
    process.start()
    return process


def _train(config: Config) -> None:
    result = MetaTrainer(config, console=Console(quiet=True)).fit()
    (Path(result.run_dir) / "result.json").write_text(json.dumps(_hashes(result)))


def _hashes(result: Result) -> dict[str, object]:
    return {"theta": result.theta_sha256, "optimizer": result.optimizer_sha256, "evaluation": str(result.evaluation)}


def _wait(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a run ended with {process.exitcode}")


def _result(config: Config) -> tuple[str, str]:
    run = Path(config.run_directory)
    return (run / "result.json").read_text(), (run / "metrics.jsonl").read_text()


def _last_checkpoint(config: Config) -> int:
    saved = Path(config.run_directory).glob("checkpoints/step_*/manifest.json")
    return max((int(path.parent.name.removeprefix("step_")) for path in saved), default=0)


def _move_away(config: Config) -> None:
    run = Path(config.run_directory)
    run.rename(run.with_name(f"done_{run.name}_{time.monotonic_ns()}"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.resume", description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="adapters of each run, on a local Ray of its own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    outcome = killed_and_resumed(options.times, options.seed, options.workers)
    sys.stdout.write(
        f"killed {outcome.killed} times, equal bits {outcome.equal} times; went on from steps"
        f" {', '.join(map(str, sorted(outcome.at_steps)))}\n"
    )
    return 0 if outcome.equal == outcome.killed == options.times else 1


if __name__ == "__main__":
    sys.exit(main())
