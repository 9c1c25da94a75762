"""How efficient 256 and 1,024 adapters would be: what `python -m benchmarks.scaling --light ..` ends with.

A model of one step, fitted to what `--light` measured on this machine (`control_plane.py`) and to how fast it adds:

    T(N) = A + D0 + D1 N + broadcast + combining + learner
    broadcast = ceil(log2(M + 1)) S / B        theta to M nodes, each of which passes it on
    combining = a level after another, until the learner can take the sums that are left, n:
                L + k S / R                    up to 8 sums of a node, added where they lie
                L + S / B + S / R              then from node to node, two at a time
    learner   = n S / B + n S / R + s S

N adapters on M = N / P nodes; A seconds of adapting a step; S bytes of theta, as large as a sum; B bytes a second of
each node's link. Fitted: D0 + D1 N, the driver's processor time a step; L, what a level takes beyond adding; R, bytes
of sums added a second; s, the learner's seconds a byte. Efficiency is A / T(N): with every adapter as busy as alone.

What it leaves out: links shared by many nodes, slower nodes (a step waits for the last one), the scheduler's jitter.
What makes it too high: D and L are of a machine whose two cores also run all of the adapters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from metadist.distributed.combining import FAR, LEARNER_TAKES_BYTES, NEAR

ADAPTERS_A_NODE = 8
LINKS = {"10 Gb/s": 10e9 / 8, "100 Gb/s": 100e9 / 8}
ADAPTING_S = (0.05, 0.25, 1.0)


@dataclass(frozen=True)
class CostModel:
    """The fitted constants; see the module."""

    driver_s: float
    driver_s_an_adapter: float
    level_s: float
    added_bytes_per_s: float
    learner_s_a_byte: float

    def step_s(self, adapters: int, adapting_s: float, theta_bytes: float, link: float) -> float:
        """T(N)."""
        nodes = math.ceil(adapters / ADAPTERS_A_NODE)
        send, add = theta_bytes / link, theta_bytes / self.added_bytes_per_s
        sums, on_a_node, combining = adapters, min(adapters, ADAPTERS_A_NODE), 0.0
        while sums > 1 and sums * theta_bytes > LEARNER_TAKES_BYTES:
            together = min(NEAR[0], on_a_node) if on_a_node > 1 else FAR
            combining += self.level_s + (together * add if on_a_node > 1 else send + add)
            sums, on_a_node = math.ceil(sums / together), math.ceil(on_a_node / together)
        broadcast = math.ceil(math.log2(nodes + 1)) * send
        learner = sums * (send + add) + self.learner_s_a_byte * theta_bytes
        driver = self.driver_s + self.driver_s_an_adapter * adapters
        return adapting_s + driver + broadcast + combining + learner

    def efficiency(self, adapters: int, adapting_s: float, theta_bytes: float, link: float) -> float:
        return adapting_s / self.step_s(adapters, adapting_s, theta_bytes, link)


def fitted(measured: Sequence[dict[str, Any]], added_bytes_per_s: float) -> CostModel:
    """Least squares over the measured steps without a lag. Needs two numbers of adapters, and one that combines."""
    rows = [one for one in measured if one["lag"] == 0]
    driver = np.array([[1, one["adapters"]] for one in rows])
    (fixed, each), *_ = np.linalg.lstsq(driver, np.array([one["driver_cpu_s"] for one in rows]), rcond=None)
    levels = [
        (one["combining_s"] - one["adapters"] * one["theta_bytes"] / added_bytes_per_s) / one["levels"]
        for one in rows
        if one["levels"]
    ]
    bytes_ = np.array([one["theta_bytes"] for one in rows], float)
    stepping = np.array([one["stepping_s"] for one in rows])
    return CostModel(
        float(fixed),
        float(each),
        max(0.0, float(np.median(levels))),
        added_bytes_per_s,
        float(bytes_ @ stepping / (bytes_ @ bytes_)),
    )


def measure_adding(size: int = 50_000_000, turns: int = 7) -> float:
    """Bytes of float32 sums that one thread adds to others in a second; memory for the result is new each time."""
    mine, theirs = np.ones(size // 4, np.float32), np.ones(size // 4, np.float32)
    seconds = []
    for _ in range(turns):
        began = perf_counter()
        mine + theirs
        seconds.append(perf_counter() - began)
    return size / float(np.median(seconds))


def predict(measured: Sequence[dict[str, Any]], picture: Path, console: Console) -> dict[str, Any]:
    """Fits the model, prints its constants and predictions, and draws efficiency against adapters."""
    model = fitted(measured, measure_adding())
    sizes = {one["model"]: one["theta_bytes"] for one in measured}
    console.print(
        f"fitted: driver {1e3 * model.driver_s:.1f} ms + {1e3 * model.driver_s_an_adapter:.3f} ms an adapter; a level"
        f" {1e3 * model.level_s:.1f} ms; adding {model.added_bytes_per_s / 1e9:.2f} GB/s; learner"
        f" {1e9 * model.learner_s_a_byte:.2f} ns a byte"
    )
    table = Table(
        *("model", "link", "adapting, s", "256 adapters", "1,024 adapters"),
        title=f"predicted efficiency, {ADAPTERS_A_NODE} adapters a node",
        title_justify="left",
        box=box.SIMPLE,
    )
    predictions = []
    for name, size in sizes.items():
        for link, rate in LINKS.items():
            for adapting in ADAPTING_S:
                at = {adapters: model.efficiency(adapters, adapting, size, rate) for adapters in (256, 1024)}
                table.add_row(name, link, f"{adapting:g}", *(f"{100 * share:.0f} %" for share in at.values()))
                predictions.append({"model": name, "link": link, "adapting_s": adapting, "efficiency": at})
    console.print(table)
    _draw(model, sizes, measured, picture)
    return {"constants": model.__dict__, "predictions": predictions}


def _draw(model: CostModel, sizes: dict[str, float], measured: Sequence[dict[str, Any]], picture: Path) -> None:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    numbers = [1, 2, 4, *(8 * 2**power for power in range(8))]
    for axes, (name, size) in zip(
        figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes.items(), strict=True
    ):
        for link, style in zip(LINKS, (":", "-"), strict=True):
            for adapting, colour in zip(ADAPTING_S, ("tab:red", "tab:orange", "tab:blue"), strict=True):
                shares = [100 * model.efficiency(n, adapting, size, LINKS[link]) for n in numbers]
                axes.plot(numbers, shares, style, color=colour, label=f"{adapting:g} s of adapting, {link}")
        rows = [one for one in measured if one["model"] == name and one["lag"] == 0]
        axes.plot(
            [one["adapters"] for one in rows],
            [100 * one["adapter_s"] / one["seconds"] for one in rows],
            "k+",
            label=f"measured, {rows[0]['adapter_s']:g} s, one machine",
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [f"{n:,}" for n in numbers], rotation=60)
        axes.set_title(f"{name}, {size / 1e6:.3g} MB")
        axes.set_xlabel("adapters")
        axes.set_ylim(0, 102)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("efficiency, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=4, loc="outside lower center")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)
