"""One run of a real cluster of several nodes in one machine, undisturbed and disturbed, side by side."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from metadist import MetaTrainer, ScalingSettings, load_config
from metadist.checkpoint import Checkpoints
from metadist.config import Config
from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.keys import TaskKey
from metadist.errors import CheckpointError
from metadist.experiment import make_experiment
from metadist.run_directory import RunDirectory
from metadist.tasks.sinusoid import Sinusoid
from metadist.training import Result
from tests.chaos.monkey import Monkey
from tests.chaos.schedule import schedule

CONFIG = Path(__file__).parents[2] / "configs/sinusoid_maml.yaml"
CHECKPOINT_EVERY = 10


@dataclass(frozen=True)
class Unhurried:
    """Sinusoids that take 5 ms a chunk longer: a step then lasts long enough to be disturbed in its midst."""

    @property
    def spec(self) -> EpisodeSpec:
        return Sinusoid().spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        time.sleep(0.005)
        return Sinusoid().sample(keys)


@dataclass(frozen=True)
class Report:
    """What was done to a run, and what it cost."""

    steps: int
    injected: dict[str, int]
    not_injected: list[str]
    adapters_lost: int
    learners_lost: int
    chunks_recomputed: int
    chunks_given_twice: int
    steps_replayed: int
    most_steps_replayed: int
    """For one loss of the learner."""
    other_rollbacks: list[str]
    """Steps rolled back for anything but a learner: there should be none."""
    seconds: float
    seconds_undisturbed: float
    torn: int
    torn_loaded: int
    """Torn checkpoints that were loaded all the same: silent damage."""
    equal_bits: bool
    recoveries: dict[str, tuple[int, float, float]]
    """How many, median and worst, in seconds."""
    slow: list[str]
    """What the adapters were doing where chunks took more than a second to be with another."""

    def tables(self) -> list[Table]:
        counts = Table("what", "count", title=f"{sum(self.injected.values())} faults in {self.steps} steps")
        for kind, count in self.injected.items():
            counts.add_row(kind, str(count))
        for name in ("adapters_lost", "learners_lost", "chunks_recomputed", "chunks_given_twice", "steps_replayed"):
            counts.add_row(name.replace("_", " "), str(getattr(self, name)))
        counts.add_row("most steps replayed for one learner", str(self.most_steps_replayed))
        counts.add_row("rolled back for adapters or nodes", f"{len(self.other_rollbacks)} times")
        counts.add_row("torn checkpoints loaded", f"{self.torn_loaded} of {self.torn}")
        lost = self.seconds - self.seconds_undisturbed
        counts.add_row("seconds lost", f"{lost:.0f}, beside {self.seconds_undisturbed:.0f} undisturbed")
        counts.add_row("bits equal to the undisturbed run's", "yes" if self.equal_bits else "NO")
        times = Table("recovery", "times", "median", "worst")
        for name, (count, median, worst) in self.recoveries.items():
            times.add_row(name, str(count), f"{median:.2f} s", f"{worst:.2f} s")
        slow = Table("over a second: what the adapters were doing at the loss, and when the chunks were given again")
        for line in self.slow:
            slow.add_row(line)
        return [counts, times, *([slow] if self.slow else [])]


@contextmanager
def three_nodes() -> Iterator[tuple[Any, list[Any]]]:
    """A head and two more nodes, of one CPU each; those that may be taken away."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    # Before others come: Ray would take any node of this machine for the driver's, and that one must stay.
    ray.init(address=cluster.address, log_to_driver=False)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def disturb(steps: int, faults: int, seed: int, console: Console) -> Report:
    """Runs `steps` steps twice on three nodes, the second time with `faults` faults."""
    due = schedule(seed, steps, faults, CHECKPOINT_EVERY)
    with tempfile.TemporaryDirectory() as place, three_nodes() as (cluster, nodes):
        config = _config(place, steps)
        began = time.monotonic()
        undisturbed = _fit(config, "undisturbed", console)
        calm = time.monotonic()
        monkey = Monkey(due, cluster, nodes, seed)
        with monkey.watching():
            disturbed = _fit(config, "disturbed", console, monkey)
        ended = time.monotonic()
        alone = MetaTrainer(
            config,
            scaling_config=ScalingSettings(num_workers=0),
            run_config=dataclasses.replace(config.run, name="alone"),
            console=Console(quiet=True),
        ).fit(evaluate=False)
        loaded = _torn_that_load(config, Path(disturbed.run_dir), monkey.torn)
        return Report(
            steps=steps,
            injected=dict(monkey.injected),
            not_injected=monkey.left,
            adapters_lost=disturbed.adapters_lost,
            learners_lost=len(monkey.replays),
            chunks_recomputed=disturbed.chunks_recomputed,
            chunks_given_twice=disturbed.chunks_given_twice,
            steps_replayed=monkey.steps_made - steps,
            most_steps_replayed=max(monkey.replays, default=0),
            other_rollbacks=monkey.other_rollbacks,
            seconds=ended - calm,
            seconds_undisturbed=calm - began,
            torn=len(monkey.torn),
            torn_loaded=len(loaded),
            equal_bits=_bits(undisturbed) == _bits(disturbed) == _bits(alone),
            recoveries={
                name: (len(times), statistics.median(times), max(times)) for name, times in monkey.recoveries.items()
            },
            slow=monkey.slow,
        )


def _config(place: str, steps: int) -> Config:
    overrides = [f"training.steps={steps}", "training.chunk_size=2", "run.log_every=1", f"run.storage_path={place}"]
    overrides += [f"run.checkpoint_config.checkpoint_frequency={CHECKPOINT_EVERY}"]
    overrides += ["run.checkpoint_config.num_to_keep=100000", "run.failure_config.max_failures=-1"]
    config = load_config(CONFIG, overrides)
    scaling = ScalingSettings(num_workers=(1, 3), hung_timeout_s=3.0)
    return dataclasses.replace(config, task=Unhurried(), scaling=scaling)


def _fit(config: Config, name: str, console: Console, *callbacks: Monkey) -> Result:
    run = dataclasses.replace(config.run, name=name)
    return MetaTrainer(config, run_config=run, callbacks=callbacks, console=console).fit(evaluate=False)


def _bits(result: Result) -> tuple[str, str, str]:
    metrics = (Path(result.run_dir) / "metrics.jsonl").read_text()
    return result.theta_sha256, result.optimizer_sha256, metrics


def _torn_that_load(config: Config, run_dir: Path, torn: set[int]) -> list[int]:
    experiment = make_experiment(config)
    checkpoints = Checkpoints(RunDirectory(str(run_dir)), experiment.theta, experiment.network.statistics_layout)
    loaded = []
    for step in torn:
        try:
            checkpoints.load(step)
        except CheckpointError:
            continue
        loaded.append(step)
    return loaded
