"""The cases of `benchmarks.inner_loop` on a CUDA device, with the memory that each takes: `python -m benchmarks.gpu`.

Skips itself, and says so, where torch sees no such device. See `benchmarks/inner_loop.py` for the method.
"""

from pathlib import Path

import click
import torch
from rich.console import Console

from benchmarks.contender import CONTENDERS
from benchmarks.inner_loop import options, run


@click.command()
@options
@click.option("--out", default="benchmarks/results/gpu.json", show_default=True, type=Path)
def main(only: tuple[str, ...], names: tuple[str, ...], quick: bool, turns: int, turn_s: float, out: Path) -> None:
    """Measures each case with all contenders on the first CUDA device, interleaved."""
    console = Console()
    if not torch.cuda.is_available():
        console.print("benchmarks.gpu: skipped, since torch sees no CUDA device here.")
        return
    console.print(torch.cuda.get_device_name())
    run("cuda", only, names or tuple(CONTENDERS), quick, turns, turn_s, out, console)


if __name__ == "__main__":
    main()
