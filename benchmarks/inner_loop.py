"""Meta-gradients of metadist and of its peers, side by side: `python -m benchmarks.inner_loop`.

All contenders compute the same case, each in a process of its own with one thread, and take turns, so that other load
on the machine meets all of them; figures are medians over turns, in seconds that the processor worked for them. First
they must agree: each one's meta-gradient is within a relative 1e-4 of plain `torch.func`'s. The share of the machine's
limit is what the layers' products take at least (`operations.py`), over the rate of a large float32 matrix product in
the same turns.

    bash benchmarks/contenders/install.sh     installs the peers (learn2learn, higher, TorchOpt) into build/peers
    python -m benchmarks.inner_loop --quick   two cases, in a minute or two
"""

import json
import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.contender import CONTENDERS, INSTALL_PEERS, PEERS, Contender, is_installed
from benchmarks.inner_loop_cases import CASES, QUICK, Case
from benchmarks.inner_loop_plot import draw
from benchmarks.operations import matrix_rate, operations_per_task

REFERENCE = "torch.func"
EAGER = "metadist, eager"
"""Measured where `training.compile: auto` does not compile."""
TOLERANCE = 1e-4


@dataclass
class Measured:
    """One contender in one case."""

    first_s: float
    """Of the first meta-gradient, compiling included."""
    error: float
    """Of the meta-gradient against the reference's, relative, in the 2-norm."""
    repeats: int
    """Meta-gradients a turn."""
    seconds: list[float] = field(default_factory=list)
    """Of one meta-gradient, turn by turn."""
    peak_memory_bytes: int = 0


def measure(
    case: Case, contenders: dict[str, Contender], device: str, turns: int, turn_s: float, console: Console
) -> tuple[dict[str, Measured], list[float]]:
    """What each contender took, and the matrix rate turn by turn. Raises ClickException where gradients differ."""
    gradients, found = {}, {}
    for name, contender in contenders.items():
        console.print(f"  {name} ..", style="dim")
        gradients[name], first_s = contender.prepare(case)
        once = min(contender.time(1) for _ in range(2))
        error = float(np.linalg.norm(gradients[name] - gradients[REFERENCE]) / np.linalg.norm(gradients[REFERENCE]))
        found[name] = Measured(first_s, error, max(1, round(turn_s / once)))
        if not error <= TOLERANCE:
            raise click.ClickException(
                f"{case.name}: the meta-gradient of {name} is {error:.1e} from that of {REFERENCE}, more than"
                f" {TOLERANCE:g}. They do not compute the same, and are not compared."
            )
    rates = []
    for _ in range(turns):
        rates.append(matrix_rate(device))
        for name, contender in contenders.items():
            repeats = found[name].repeats
            found[name].seconds.append(contender.time(repeats) / repeats)
    for name, contender in contenders.items():
        found[name].peak_memory_bytes = contender.peak_memory()
    return found, rates


def summarised(case: Case, found: dict[str, Measured], rates: list[float]) -> dict[str, Any]:
    """A case's figures as plain values."""
    rate, operations = statistics.median(rates), operations_per_task(case)
    speeds = {name: case.tasks / statistics.median(one.seconds) for name, one in found.items()}
    best_peer = max((name for name in speeds if name in PEERS), key=speeds.__getitem__, default=None)
    return {
        "case": case.name,
        "operations_per_task": operations,
        "matrix_rate": rate,
        "matrix_rates": rates,
        "best_peer": best_peer,
        "contenders": {
            name: {
                "tasks_per_second": speeds[name],
                "slowest": case.tasks / max(one.seconds),
                "fastest": case.tasks / min(one.seconds),
                "ratio_to_best_peer": speeds[name] / speeds[best_peer] if best_peer else None,
                "ratio_to_torch_func": speeds[name] / speeds[REFERENCE],
                "share_of_matrix_rate": speeds[name] * operations / rate,
                "gradient_error": one.error,
                "first_s": one.first_s,
                "seconds": one.seconds,
                "peak_memory_bytes": one.peak_memory_bytes,
            }
            for name, one in found.items()
        },
    }


def table_of(summary: dict[str, Any], device: str) -> Table:
    needed, rate = summary["operations_per_task"] / 1e6, summary["matrix_rate"] / 1e9
    title = f"{summary['case']}: {needed:.3g} MFLOP a task, matrix product {rate:.0f} GFLOP/s"
    table = Table("", title=title, title_justify="left", box=box.SIMPLE)
    columns = ["tasks/s", "slowest", "fastest", "x best peer", "x torch.func", "of limit", "first, s"]
    for column in [*columns, "MiB"] if device == "cuda" else columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in summary["contenders"].items():
        ratio = one["ratio_to_best_peer"]
        cells = [
            f"{one['tasks_per_second']:.4g}",
            f"{one['slowest']:.4g}",
            f"{one['fastest']:.4g}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{one['ratio_to_torch_func']:.2f}",
            f"{one['share_of_matrix_rate']:.1%}",
            f"{one['first_s']:.1f}",
        ]
        if device == "cuda":
            cells.append(f"{one['peak_memory_bytes'] / 2**20:.0f}")
        table.add_row(name, *cells)
    return table


def options(command: Callable[..., None]) -> Callable[..., None]:
    """What `benchmarks.inner_loop` and `benchmarks.gpu` take."""
    for option in (
        click.option("--turn-s", default=0.5, show_default=True, help="Least seconds of a contender's turn."),
        click.option("--turns", default=7, show_default=True),
        click.option("--quick", is_flag=True, help="Two cases, three short turns."),
        click.option("--contender", "names", multiple=True, type=click.Choice(list(CONTENDERS)), help="Only these."),
        click.option(
            "--case", "only", multiple=True, type=click.Choice(list(CASES)), help="Only these; all by default."
        ),
    ):
        command = option(command)
    return command


def run(
    device: str,
    only: tuple[str, ...],
    names: tuple[str, ...],
    quick: bool,
    turns: int,
    turn_s: float,
    out: Path,
    console: Console,
) -> None:
    """Measures and prints case by case; writes all into `out` (JSON) and beside it as a picture."""
    if quick:
        only, turns, turn_s = only or QUICK, 3, 0.2
    # torch.func comes first: it is what the others' gradients are held against.
    names = (REFERENCE, *(name for name in CONTENDERS if name in names and name != REFERENCE))
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    missing = [name for name in names if not is_installed(name)]
    versions = {"torch": torch.__version__, "device": device, "threads": 1, "turns": turns}
    summaries: dict[str, Any] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for key in only or CASES:
        case = CASES[key]
        console.print(f"{case.name} ({key})")
        with ExitStack() as stack:
            chosen = [name for name in names if name not in missing and (name != EAGER or not case.has_convolutions)]
            contenders = {name: stack.enter_context(Contender(name, device)) for name in chosen}
            found, rates = measure(case, contenders, device, turns, turn_s, console)
        summaries[key] = summarised(case, found, rates)
        console.print(table_of(summaries[key], device))
        out.write_text(json.dumps(versions | {"cases": summaries}, indent=1))
    draw(summaries, out.with_suffix(".png"))
    console.print(f"{out} and {out.with_suffix('.png')} are written")
    if missing:
        console.print(f"left out, not being installed: {', '.join(missing)}. Install them with: {INSTALL_PEERS}")


@click.command()
@options
@click.option("--out", default="benchmarks/results/inner_loop.json", show_default=True, type=Path)
def main(only: tuple[str, ...], names: tuple[str, ...], quick: bool, turns: int, turn_s: float, out: Path) -> None:
    """Measures each case with all contenders, interleaved."""
    run("cpu", only, names or tuple(CONTENDERS), quick, turns, turn_s, out, Console(width=120))


if __name__ == "__main__":
    main()
