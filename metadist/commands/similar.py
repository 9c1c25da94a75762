"""`metadist similar`."""

from typing import TYPE_CHECKING

import click

from metadist.commands.output import invert_option, json_option, print_json, result_console
from metadist.commands.support import read_support

if TYPE_CHECKING:
    from metadist.similarity import Similarity


@click.command()
@click.argument("run")
@click.option("--support", required=True, metavar="FILE|DIR", help="Labelled examples: images, Parquet or CSV.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this outer step, instead of the newest.")
@invert_option
@json_option
def similar(run: str, support: str, step: int | None, invert: bool, as_json: bool) -> None:
    """Say whether your task is like those that RUN was meta-trained on: near, a stretch or far."""
    from metadist.adaptation import load
    from metadist.similarity import similarity

    loaded = load(run, step=step)
    x, y = read_support(loaded, support, invert)
    found = similarity(loaded, x, y)
    if as_json:
        print_json({"run_dir": loaded.location, "step": loaded.step, **found.as_dict()})
    else:
        _show(found)


def _show(found: "Similarity") -> None:
    from rich.table import Table

    console = result_console()
    console.print(
        f"{found.verdict}: p = {found.p_value:.3f}, the share of {found.validation_tasks} held-out tasks of the run's"
        " own that are at least as unlike its training tasks"
    )
    console.print(found.advice)
    table = Table("statistic", "standard deviations from training tasks")
    for name, value in sorted(found.deviations.items(), key=lambda item: -abs(item[1])):
        table.add_row(name.replace("_", " "), f"{value:+.1f}")
    console.print(table)
    console.print("nearest in training  " + ", ".join(name for name, _ in found.nearest))
