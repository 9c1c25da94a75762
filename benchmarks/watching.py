"""What watching for faults costs a run that has none: `python -m benchmarks.watching`.

Two executors with two adapters each live side by side on one local Ray and take turns: metadist's own, and one that
hands out ranges and waits for them without a ledger, deadlines, a look for hung adapters or draining nodes. Beside
the ratio of their medians, the time that the driver itself spends on watching is added up, call by call.
"""

import functools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import click
import ray
from rich.console import Console
from rich.table import Table

from benchmarks.results import write_results
from benchmarks.scaling import seconds_of
from metadist import load_config
from metadist.core.plan import Range
from metadist.distributed.cluster import connect
from metadist.distributed.draining import DrainingNodes
from metadist.distributed.ledger import Ledger
from metadist.distributed.pace import Pace
from metadist.distributed.ray_executor import RayExecutor
from metadist.distributed.work import Result, Work
from metadist.experiment import make_experiment
from metadist.sections import ScalingSettings

WATCHING = {
    Ledger: ("submit", "done"),
    Pace: ("note", "deadline_s"),
    Work: ("_late",),
    DrainingNodes: ("news",),
    RayExecutor: ("_give_up_hung", "_leave_draining_nodes"),
}


class Unwatched(RayExecutor):
    """Hands out each range once, and waits for all of them, whatever happens."""

    def _complete(self, work: Work) -> dict[Range, Result]:
        work.hand_out(self._free())
        for call, receipt in zip(work.calls.values(), ray.get(list(work.calls)), strict=True):
            work.results[call.span] = call.result
            work.receipt += receipt
        return work.results


@contextmanager
def added_up() -> Iterator[list[float]]:
    """Seconds that the calls of WATCHING take while this is open, those within others counted twice."""
    seconds: list[float] = []

    def timed(method: Any) -> Any:
        @functools.wraps(method)
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = method(*arguments)
            seconds.append(time.perf_counter() - began)
            return result

        return call

    patches = [
        mock.patch.object(kind, name, timed(getattr(kind, name))) for kind, names in WATCHING.items() for name in names
    ]
    for patch in patches:
        patch.start()
    try:
        yield seconds
    finally:
        for patch in patches:
            patch.stop()


@click.command()
@click.argument("config", default="configs/omniglot_5w1s_maml.yaml")
@click.option("--steps", default=10, show_default=True, help="Meta-iterations a turn.")
@click.option("--turns", default=15, show_default=True)
@click.option("--out", default="benchmarks/results/watching.json", show_default=True)
def main(config: str, steps: int, turns: int, out: str) -> None:
    """Times CONFIG with and without watching for faults, interleaved."""
    console = Console()
    settings, scaling = load_config(config), ScalingSettings(num_workers=2, start_timeout_s=600)
    experiment = make_experiment(settings)
    disconnect = connect(ScalingSettings(num_workers=4), console)
    executors: dict[str, RayExecutor] = {}
    for name, kind in (("watched", RayExecutor), ("unwatched", Unwatched)):
        executors[name] = kind(experiment, settings.outer, settings.training.steps, scaling)
        executors[name].start(None, None, lambda: False)
    seconds: dict[str, list[float]] = {name: [] for name in executors}
    watching: list[float] = []
    for turn in range(turns):
        for name, executor in executors.items():
            with added_up() as spent:
                seconds[name].append(seconds_of(executor, settings, turn * steps, steps))
            if name == "watched":
                watching.append(sum(spent))
    medians = {name: statistics.median(times) / steps for name, times in seconds.items()}
    share = statistics.median(spent / whole for spent, whole in zip(watching, seconds["watched"], strict=True))
    table = Table("", "ms a step (median)", title=f"{config}: {turns} turns of {steps} steps, two adapters")
    for name, median in medians.items():
        table.add_row(name, f"{1000 * median:.1f}")
    table.add_row("ratio", f"{medians['watched'] / medians['unwatched']:.3f}")
    table.add_row("the driver's own watching", f"{share:.2%} of a step")
    console.print(table)
    for executor in executors.values():
        executor.close()
    disconnect()
    write_results(out, {"config": config, "steps": steps, "seconds": seconds, "seconds_watching": watching})


if __name__ == "__main__":
    main()
