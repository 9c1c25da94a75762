"""What watching for faults costs a run that has none: `python -m benchmarks.watching`.

One executor with two adapters takes turns with itself: as it is, and handing out ranges and waiting for them without a
ledger, deadlines, a look for hung adapters or draining nodes. The processes are the same ones, so that nothing but the
watching differs. Beside the ratio, the time that the driver itself spends on watching is added up, call by call.
"""

import functools
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
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


def unwatched(executor: RayExecutor, work: Work) -> dict[Range, Result]:
    """Instead of `RayExecutor._complete`: hands out each range once, and waits for all of them, whatever happens."""
    work.hand_out(executor._free())
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
@click.option("--turns", default=40, show_default=True, help="Pairs of turns, one of them watched.")
@click.option("--out", default="benchmarks/results/watching.json", show_default=True)
def main(config: str, steps: int, turns: int, out: str) -> None:
    """Times CONFIG with and without watching for faults, interleaved."""
    console = Console()
    settings, scaling = load_config(config), ScalingSettings(num_workers=2, start_timeout_s=600)
    disconnect = connect(scaling, console)
    executor = RayExecutor(make_experiment(settings), settings.outer, steps * (1 + 2 * turns), scaling)
    executor.start(None, None, lambda: False)
    kinds = {"watched": RayExecutor._complete, "unwatched": unwatched}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    watching: list[float] = []
    firsts = count(0, steps)
    seconds_of(executor, settings, next(firsts), steps)
    for turn in range(turns):
        # Each of the two comes first in every other turn.
        for name in sorted(kinds, reverse=turn % 2 == 0):
            with mock.patch.object(RayExecutor, "_complete", kinds[name]), added_up() as spent:
                seconds[name].append(seconds_of(executor, settings, next(firsts), steps))
            if name == "watched":
                watching.append(sum(spent))
    executor.close()
    disconnect()
    table = Table(show_header=False, title=f"{config}: {turns} pairs of turns of {steps} steps, two adapters")
    for name, times in seconds.items():
        table.add_row(f"{name}, ms a step (median)", f"{1000 * statistics.median(times) / steps:.1f}")
    ratios = [watched / alone for watched, alone in zip(seconds["watched"], seconds["unwatched"], strict=True)]
    half = 1.96 * statistics.stdev(ratios) / math.sqrt(turns)
    table.add_row("ratio within a pair (mean, 95 % interval)", f"{statistics.mean(ratios):.3f} ± {half:.3f}")
    share = statistics.median(spent / whole for spent, whole in zip(watching, seconds["watched"], strict=True))
    table.add_row("the driver's own watching", f"{share:.2%} of a step")
    console.print(table)
    write_results(out, {"config": config, "steps": steps, "seconds": seconds, "seconds_watching": watching})


if __name__ == "__main__":
    main()
