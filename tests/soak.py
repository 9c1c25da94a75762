"""`python -m tests.soak`: trains for long under a kill every 20 seconds, and draws what its processes hold meanwhile.

Resident memory of driver, learner and adapters, bytes in the object store, open files and threads: none of them may
grow. The verdict compares the last quarter of the time with the second one, after a first one to warm up.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from rich.console import Console

from metadist import Callback, MetaTrainer, ScalingSettings, load_config
from tests.distributed.faulty import processes_named

CONFIG = Path(__file__).parents[1] / "configs/sinusoid_maml.yaml"
KILL_EVERY_S, LOOK_EVERY_S = 20.0, 5.0
LEARNER_EACH = 6
"""So many kills are of one adapter each, and then one of the learner."""
MAY_GROW = 1.10
SERIES = {
    "driver_mib": "driver, MiB",
    "learner_mib": "learner, MiB",
    "adapter_mib": "largest adapter, MiB",
    "object_store_mib": "object store, MiB",
    "open_files": "open files of the driver",
    "threads": "threads of the driver",
}


class Over(Exception):
    """The time is up."""


class Watch(Callback):
    """Looks at the processes every few seconds, kills one every 20, and ends the run when its time is up."""

    def __init__(self, minutes: float, seed: int) -> None:
        self._ends = time.monotonic() + 60 * minutes
        self._random = random.Random(seed)
        self._began = self._killed = self._looked = time.monotonic()
        self.kills: dict[str, int] = {"adapter": 0, "learner": 0}
        self.samples: list[dict[str, float]] = []
        self.steps = 0

    def on_step(self, step: int, metrics: dict[str, float], status: Any) -> None:
        self.steps = step
        now = time.monotonic()
        if now >= self._ends:
            raise Over
        if now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            self.samples.append({"minutes": (now - self._began) / 60, "step": step, **_held()})
        if now - self._killed >= KILL_EVERY_S:
            self._killed = now
            number = sum(self.kills.values())
            kind = "learner" if number % (LEARNER_EACH + 1) == LEARNER_EACH else "adapter"
            pids = processes_named(f"ray::{kind.capitalize()}Actor", os.getpid())
            if pids:
                os.kill(self._random.choice(pids), signal.SIGKILL)
                self.kills[kind] += 1


def _held() -> dict[str, float]:
    learners, adapters = (processes_named(f"ray::{name}Actor", os.getpid()) for name in ("Learner", "Adapter"))
    return {
        "driver_mib": _resident_mib(os.getpid()),
        "learner_mib": max(map(_resident_mib, learners), default=float("nan")),
        "adapter_mib": max(map(_resident_mib, adapters), default=float("nan")),
        "object_store_mib": _object_store_mib(),
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
    }


def _resident_mib(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass  # It ended while we looked.
    return float("nan")


def _object_store_mib() -> float:
    import ray
    from ray._private.internal_api import node_stats

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return float(stats.store_stats.object_store_bytes_used) / 2**20


def soak(minutes: float, seed: int, console: Console) -> Watch:
    """Trains the sinusoid on two adapters of a local Ray until the time is up."""
    watch = Watch(minutes, seed)
    with tempfile.TemporaryDirectory() as place:
        overrides = ["training.steps=100000000", "run.checkpoint_config.checkpoint_frequency=200"]
        overrides += ["run.failure_config.max_failures=-1", f"run.storage_path={place}", "training.chunk_size=4"]
        config = dataclasses.replace(load_config(CONFIG, overrides), scaling=ScalingSettings(num_workers=2))
        try:
            MetaTrainer(config, callbacks=[watch], console=console).fit(evaluate=False)
        except Over:
            return watch
    raise AssertionError("the run ended before its time")


def growth(samples: list[dict[str, float]]) -> dict[str, float]:
    """The median of the last quarter over that of the second, of each series."""
    quarter = max(1, len(samples) // 4)
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]

    def median(part: list[dict[str, float]], name: str) -> float:
        return statistics.median([sample[name] for sample in part if sample[name] == sample[name]] or [1.0])

    return {name: (median(last, name) + 1) / (median(second, name) + 1) for name in SERIES}


def draw(watch: Watch, path: Path) -> None:
    """One small plot a series, each from zero."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 5), layout="constrained")
    for axis, (name, title) in zip(axes.flat, SERIES.items(), strict=True):
        axis.plot([s["minutes"] for s in watch.samples], [s[name] for s in watch.samples], linewidth=1.2)
        axis.set(title=title, xlabel="minutes")
        axis.set_ylim(0, 1.25 * max(s[name] for s in watch.samples if s[name] == s[name]))
    kills = f"{watch.kills['adapter']} adapters and {watch.kills['learner']} learners killed"
    figure.suptitle(f"{watch.samples[-1]['minutes']:.0f} minutes of training, {watch.steps:,} steps, {kills}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak.png"), help="the plot; its numbers lie beside it, .json")
    options = parser.parse_args()
    # Ray tells of every death on stdout, which is to hold the result alone.
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"HOME": home, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        os.environ.pop("RAY_ADDRESS", None)
        watch = soak(options.minutes, options.seed, Console(stderr=True, soft_wrap=True))
    draw(watch, options.out)
    grown = growth(watch.samples)
    result = {"steps": watch.steps, "kills": watch.kills, "growth": grown, "samples": watch.samples}
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for name, ratio in grown.items():
        stdout.write(f"{SERIES[name]:28} {ratio:6.3f} of the second quarter's median in the last one\n")
    stdout.close()
    return 0 if all(ratio <= MAY_GROW for ratio in grown.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
