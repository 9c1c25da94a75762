"""How much faster two adapters are than one, each with one thread: `python -m benchmarks.scaling`.

Both executors live side by side on one local Ray and take turns, so that other load on the machine
meets both; the ratio of medians is the figure. What is timed is whole meta-iterations: publishing,
adapting, reducing, stepping. In between, the same adapters compute the same chunks with nothing to
wait for and nobody to talk to: what the machine itself gives to so many processes at that moment.

With `--light 8 --light 32 ..` it measures instead how many adapters one learner can serve (`control_plane.py`), and
what that lets expect of a cluster (`cost_model.py`).
"""

import dataclasses
import statistics
import time
from pathlib import Path

import click
import ray
from rich.console import Console
from rich.table import Table

from benchmarks import control_plane, cost_model
from benchmarks.results import write_results
from metadist import load_config
from metadist.config import Config
from metadist.core.plan import Plan, Range, plan_step
from metadist.distributed.executor import Executor
from metadist.distributed.ray_executor import RayExecutor
from metadist.distributed.start import make_executor
from metadist.experiment import make_experiment
from metadist.sections import ScalingSettings


def seconds_of(executor: Executor, config: Config, first_step: int, steps: int) -> float:
    """Wall-clock seconds of `steps` meta-iterations from `first_step`."""
    training = config.training

    def plan(step: int) -> Plan:
        return plan_step(training.seed, step, training.meta_batch_size, training.tasks_per_chunk)

    began = time.perf_counter()
    for step in range(first_step, first_step + steps):
        theta = executor.publish()
        executor.step(plan(step), theta, executor.run(plan(step), theta))
    seconds = time.perf_counter() - began
    # The executor is ahead by now: what its adapters have begun must not run into the other one's turn.
    executor.run(plan(first_step + steps), executor.publish())
    return seconds


def seconds_alone(executor: RayExecutor, number: int, config: Config, steps: int) -> float:
    """Wall-clock seconds in which `number` adapters, each for itself, compute `steps / number` whole plans."""
    training = config.training
    plan = plan_step(training.seed, 0, training.meta_batch_size, training.tasks_per_chunk)
    theta, chunks = executor.publish(), Range(0, plan.num_chunks)
    began = time.perf_counter()
    receipts = [
        slot.actor.sum_range.options(num_returns=2).remote(plan, chunks, theta)[0]
        for slot in executor._slots[:number]
        for _ in range(steps // number)
    ]
    ray.get(receipts)
    return time.perf_counter() - began


@click.command()
@click.argument("config", default="configs/omniglot_5w1s_maml.yaml")
@click.option("--workers", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--steps", default=10, show_default=True, help="Meta-iterations a turn.")
@click.option("--turns", default=7, show_default=True)
@click.option("--light", multiple=True, type=int, help="Instead: so many adapters that only wait; may be repeated.")
@click.option("--light-s", default=0.05, show_default=True, help="Seconds that a light adapter waits.")
@click.option("--out", default="benchmarks/results/scaling.json", show_default=True)
def main(
    config: str, workers: tuple[int, ...], steps: int, turns: int, light: tuple[int, ...], light_s: float, out: str
) -> None:
    """Times CONFIG with each number of workers, interleaved."""
    from metadist.distributed.cluster import connect

    console = Console(width=120)
    if light:
        disconnect = connect(ScalingSettings(), console)
        found = control_plane.run(light, light_s, steps, console)
        disconnect()
        results = {"steps": steps, "adapters": found}
        if any(one["levels"] for one in found) and len({one["adapters"] for one in found}) > 1:
            results["cost_model"] = cost_model.predict(found, Path(out).with_name("cost_model.png"), console)
        else:
            console.print("No prediction: it needs two numbers of adapters, one of them so large that they combine.")
        write_results(Path(out).with_name("control_plane.json"), results)
        return
    settings = load_config(config)
    experiment = make_experiment(settings)
    disconnect = connect(ScalingSettings(num_workers=sum(workers)), console)
    executors: dict[int, RayExecutor] = {}
    for number in workers:
        scaled = dataclasses.replace(settings, scaling=ScalingSettings(num_workers=number, start_timeout_s=600))
        executor = make_executor(scaled, experiment, console)
        assert isinstance(executor, RayExecutor), "--workers must be 1 or more"
        executors[number] = executor
        executors[number].start(None, None, lambda: False)
    seconds: dict[int, list[float]] = {number: [] for number in workers}
    alone: dict[int, list[float]] = {number: [] for number in workers}
    for turn in range(turns):
        for number, executor in executors.items():
            seconds[number].append(seconds_of(executor, settings, turn * steps, steps))
            alone[number].append(seconds_alone(executor, number, settings, steps))
    tasks = steps * settings.training.meta_batch_size
    medians = {number: tasks / statistics.median(times) for number, times in seconds.items()}
    ceilings = {number: tasks / statistics.median(times) for number, times in alone.items()}
    table = Table(title=f"{config}: {turns} turns of {steps} steps, one thread an adapter", title_justify="left")
    for column in (
        "adapters",
        "tasks/s (median)",
        "slowest",
        "fastest",
        f"ratio to {workers[0]}",
        "alone, tasks/s",
        "ratio",
        "share",
    ):
        table.add_column(column, justify="right")
    for number, times in seconds.items():
        table.add_row(
            str(number),
            f"{medians[number]:.1f}",
            f"{tasks / max(times):.1f}",
            f"{tasks / min(times):.1f}",
            f"{medians[number] / medians[workers[0]]:.2f}",
            f"{ceilings[number]:.1f}",
            f"{ceilings[number] / ceilings[workers[0]]:.2f}",
            f"{medians[number] / ceilings[number]:.0%}",
        )
    console.print(table)
    for executor in executors.values():
        executor.close()
    disconnect()
    write_results(out, {"config": config, "steps": steps, "seconds": seconds, "seconds_alone": alone})


if __name__ == "__main__":
    main()
