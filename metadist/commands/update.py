"""`metadist update`."""

from typing import TYPE_CHECKING, Any

import click

from metadist.commands.output import invert_option, json_option, print_json, progress_console, result_console
from metadist.commands.train import workers_option

if TYPE_CHECKING:
    from metadist.updating import Update

BEFORE = -1
"""`--rollback` without a number."""


@click.command()
@click.argument("run")
@click.option(
    "--tasks", metavar="DIR", help="New tasks: a file or a directory for each, as `adapt --support` takes it."
)
@click.option("--steps", type=click.IntRange(min=1), help="Outer steps; left out, each new task is drawn four times.")
@click.option("--lr", type=float, help="Left out, the rate that training ended with, at least a tenth of outer.lr.")
@click.option("--share", default=0.5, show_default=True, help="Of new tasks in each step; the others are old ones.")
@click.option(
    "--margin",
    default=0.5,
    show_default=True,
    help="Points of accuracy (per cent of the loss) that old tasks may lose.",
)
@click.option(
    "--episodes", default=300, show_default=True, type=click.IntRange(min=2), help="Frozen old episodes that decide."
)
@click.option(
    "--workers", callback=workers_option, default="0", show_default=True, metavar="N|MIN:MAX", help="Adapters."
)
@click.option(
    "--rollback",
    is_flag=False,
    flag_value=BEFORE,
    type=int,
    metavar="[VERSION]",
    help="Go back to the version before, or to VERSION (0 is the training's own).",
)
@invert_option
@json_option
def update(
    run: str,
    tasks: str | None,
    steps: int | None,
    lr: float | None,
    share: float,
    margin: float,
    episodes: int,
    workers: Any,
    rollback: int | None,
    invert: bool,
    as_json: bool,
) -> None:
    """Learn from new tasks without forgetting old ones: RUN's next version, or none where old tasks suffer.

    Every command that takes RUN then takes its current version. Exit status 1 where the update is not accepted.
    """
    from metadist.errors import UserError
    from metadist.updating import roll_back
    from metadist.updating import update as update_run

    if (tasks is None) == (rollback is None):
        raise UserError("give either --tasks DIR, to learn from, or --rollback.")
    if rollback is not None:
        number = roll_back(run, None if rollback == BEFORE else rollback)
        print_json({"version": number}) if as_json else click.echo(f"version {number} of {run} is in use")
        return
    assert tasks is not None
    result = update_run(
        run,
        tasks,
        steps=steps,
        lr=lr,
        share=share,
        margin=margin / 100,
        episodes=episodes,
        num_workers=workers,
        invert=invert,
        console=progress_console(),
    )
    if as_json:
        print_json(result.as_dict())
    else:
        _show(result)
    if not result.accepted:
        click.get_current_context().exit(1)


def _show(result: "Update") -> None:
    from rich.table import Table

    from metadist.scores import add_column, written

    console = result_console()
    console.print(f"{result.steps} steps over {result.tasks} new tasks, lr {result.lr:g}, share {result.share:g}")
    rows = {"new tasks": (result.own_before, result.own_after), "old tasks": (result.old_before, result.old_after)}
    shown = {name: [written(score, result.score) for score in scores] for name, scores in rows.items()}
    table = Table("mean and 95 % interval")
    for number, header in enumerate(("before", "after")):
        add_column(table, header, [cells[number] for cells in shown.values()])
    for name, cells in shown.items():
        table.add_row(name, *cells)
    console.print(table)
    change = written(result.old_change, "accuracy", "+")
    unit = "points" if result.score == "accuracy" else "% of the loss"
    said = f"old tasks, episode by episode: {change} {unit}; {100 * result.margin:g} may be lost"
    if result.accepted:
        console.print(f"{said}: accepted, version {result.version} of {result.run_dir} is in use")
        console.print(f"back to version {result.parent}: metadist update {result.run_dir} --rollback")
    else:
        console.print(f"{said}: not accepted, version {result.parent} stays in use")
        console.print("try a smaller --lr, fewer --steps or a smaller --share", style="yellow")
    console.print(f"theta  sha256 {result.theta_sha256}")
