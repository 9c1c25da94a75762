"""How many adapters one learner can serve: part (2) of `python -m benchmarks.scaling`.

The learner, the executor and Ray are the real ones; adapters only wait for a fixed time and then give sums as large as
the model's, one range each. What a step takes beyond that time is what publishing, handing out, collecting, reducing
and stepping cost.
"""

import statistics
import time
from typing import Any

import ray
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.inner_loop_cases import CASES
from benchmarks.light_adapter import LightAdapter
from metadist.algorithms import MAML
from metadist.config import Config
from metadist.core.plan import Range, plan_step
from metadist.distributed.ray_executor import RayExecutor
from metadist.distributed.work import Result, Slot, Work
from metadist.experiment import Experiment, make_experiment
from metadist.sections import ScalingSettings, TrainingSettings

MEASURED = ("seconds", "driver_cpu_s", "combining_s", "levels", "stepping_s")
"""Of a step: its wall-clock time, this process's processor time, levels of adapters that add up sums and what they
took, and the learner's optimizer."""
MODELS = {"Conv-4": "strided", "ResNet-12": "resnet12"}


class _LightExecutor(RayExecutor):
    """Ray's executor over light adapters, which take no CPU."""

    adapter_s = 0.0
    theta_size = 0
    combining_s = 0.0
    levels = 0
    """Of the last step."""

    def _new_slot(self) -> Slot:
        actor: Any = ray.remote(LightAdapter).options(num_cpus=0).remote(self.theta_size, self.adapter_s)
        return Slot(actor, actor.prepare.remote(self._experiment))

    def _combined(self, *arguments: Any) -> Any:
        self.levels, began = 0, time.perf_counter()
        combined = super()._combined(*arguments)
        self.combining_s = time.perf_counter() - began
        return combined

    def _complete(self, work: Work) -> dict[Range, Result]:
        self.levels += bool(work.homes)
        return super()._complete(work)


def measure(model: str, adapters: int, adapter_s: float, steps: int, lag: int) -> dict[str, Any]:
    """Steps a second and bytes a step, with a connected Ray."""
    case = CASES[MODELS[model]]
    training = TrainingSettings(meta_batch_size=adapters, chunk_size=1, batch_norm="transductive", compile=False)
    scaling = ScalingSettings(num_workers=adapters, start_timeout_s=600)
    config = Config(task=_Shapes(case.spec), model=case.model, algorithm=MAML(), training=training, scaling=scaling)
    outer = type(config.outer)(lag=lag)
    experiment: Experiment = make_experiment(config)
    executor = _LightExecutor(experiment, outer, 10**9, scaling)
    executor.adapter_s, executor.theta_size = adapter_s, experiment.theta.size
    try:
        executor.start(None, None, lambda: False)
        found: dict[str, list[float]] = {name: [] for name in (*MEASURED, "sums")}
        for step in range(steps + 2):
            began, worked = time.perf_counter(), time.process_time()
            plan, theta = plan_step(0, step, adapters, 1), executor.publish()
            sums = executor.run(plan, theta)
            executor.step(plan, theta, sums)
            found["seconds"].append(time.perf_counter() - began)
            found["driver_cpu_s"].append(time.process_time() - worked)
            found["combining_s"].append(executor.combining_s)
            found["levels"].append(executor.levels)
            found["stepping_s"].append(executor.seconds.stepping)
            found["sums"].append(len(sums))
        medians = {name: statistics.median(values[2:]) for name, values in found.items()}
    finally:
        executor.close()
    size = 4 * experiment.theta.size
    return {
        "model": model,
        "adapters": adapters,
        "lag": lag,
        "adapter_s": adapter_s,
        "theta_bytes": size,
        "steps_per_second": 1 / medians["seconds"],
        "beyond_adapters_s": medians["seconds"] - adapter_s,
        "bytes_to_learner": size * medians["sums"],
        **{name: medians[name] for name in MEASURED},
    }


class _Shapes:
    """A task source that is asked for nothing but its spec."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def sample(self, keys: list[Any]) -> Any:
        raise NotImplementedError


def run(numbers: tuple[int, ...], adapter_s: float, steps: int, console: Console) -> list[dict[str, Any]]:
    """Measures and prints each model with each number of adapters; large gradients with at most 16."""
    table = Table(
        *("model", "adapters", "lag", "steps/s", "beyond the adapters, ms", "of that combining, ms"),
        *("driver's CPU, ms", "to the learner, MB a step"),
        title=f"light adapters that wait {1e3 * adapter_s:.0f} ms, medians of {steps} steps",
        title_justify="left",
        box=box.SIMPLE,
    )
    found = []
    for model in MODELS:
        for adapters in numbers:
            if model != "Conv-4" and adapters > 16:
                continue
            for lag in (0, 1):
                one = measure(model, adapters, adapter_s, steps, lag)
                found.append(one)
                table.add_row(
                    model,
                    str(adapters),
                    str(lag),
                    f"{one['steps_per_second']:.1f}",
                    f"{1e3 * one['beyond_adapters_s']:.1f}",
                    f"{1e3 * one['combining_s']:.1f}",
                    f"{1e3 * one['driver_cpu_s']:.1f}",
                    f"{one['bytes_to_learner'] / 1e6:.1f}",
                )
    console.print(table)
    return found
