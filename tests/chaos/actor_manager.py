"""The scenario by which RLlib tests its actor manager: 4 actors, 10 rounds, a tenth of all calls crash, a tenth raise.

Lost and failed calls are dropped there (`test_sync_call_healthy_only` of ray/rllib/utils/tests/test_actor_manager.py).
Here every call's result is needed. A range that raises twice ends a run by design, since that is no accident;
so here one that has raised may crash, but does not raise again.
"""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from metadist import MetaTrainer, ScalingSettings, load_config
from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.keys import TaskKey
from metadist.tasks.sinusoid import Sinusoid
from tests.chaos.disturbed_run import CONFIG

_has_started = False
ACTORS, ROUNDS = 4, 10
CRASHES, RAISES = 0.1, 0.1


@dataclass(frozen=True)
class Unreliable:
    """Sinusoids; every call of a round crashes or raises with these probabilities, drawn from call and attempt."""

    directory: Path
    seed: int

    @property
    def spec(self) -> EpisodeSpec:
        return Sinusoid().spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        global _has_started
        first = keys[0]
        # What a process samples for its fingerprint, and what looks for the task that raised, are no calls of a round.
        is_call, _has_started = _has_started and len(keys) > 1, True
        if is_call and (self.directory / "begun").exists():
            call = f"{first.step}_{first.task}"
            attempt = len(list(self.directory.glob(f"{call}_*")))
            drawn = np.random.default_rng([self.seed, first.step, first.task, attempt]).random()
            raised = any(self.directory.glob(f"{call}_*_raised"))
            crashes, raises = drawn < CRASHES, CRASHES <= drawn < CRASHES + RAISES and not raised
            outcome = "crashed" if crashes else "raised" if raises else "good"
            (self.directory / f"{call}_{attempt}_{outcome}").touch()
            if crashes:
                os._exit(1)
            if raises:
                raise ValueError("a tenth of all calls do")
        return Sinusoid().sample(keys)


@dataclass(frozen=True)
class Outcome:
    crashed: int
    raised: int
    good: int
    """Calls whose result is in a step, of ACTORS * ROUNDS."""
    equal_bits: bool


def rounds(seed: int, console: Console) -> Outcome:
    """Ten steps of four calls, on four adapters."""
    with tempfile.TemporaryDirectory() as place:
        config = load_config(
            CONFIG,
            [
                f"training.steps={ROUNDS}",
                "training.meta_batch_size=16",
                "training.chunk_size=4",
                f"run.storage_path={place}",
            ],
        )
        source = Unreliable(Path(place), seed)

        def fit(workers: int, name: str) -> tuple[str, str]:
            trainer = MetaTrainer(
                dataclasses.replace(config, task=source),
                scaling_config=ScalingSettings(num_workers=workers, resources_per_worker={"CPU": 0.5}),
                run_config=dataclasses.replace(config.run, name=name),
                console=console,
            )
            result = trainer.fit(evaluate=False)
            return result.theta_sha256, result.optimizer_sha256

        alone = fit(0, "alone")
        (source.directory / "begun").touch()
        equal = fit(ACTORS, "unreliable") == alone
        count = {name: len(list(Path(place).glob(f"*_{name}"))) for name in ("crashed", "raised")}
        good = {path.name.rsplit("_", 2)[0] for path in Path(place).glob("*_good")}
        return Outcome(count["crashed"], count["raised"], len(good), equal)
