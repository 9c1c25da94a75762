"""`metadist tune`."""

import click

from metadist.commands.output import insecure_option, json_option, print_json, progress_console, result_console


@click.command()
@click.argument("sweep")
@click.option("--resume", is_flag=True, help="Go on with a sweep that was ended in its midst.")
@click.option(
    "--from",
    "earlier",
    multiple=True,
    metavar="DIR",
    help="Begin with the best points of this ended sweep; repeatable.",
)
@click.option("--address", metavar="ADDR", help="A Ray cluster to join, instead of $RAY_ADDRESS or a local one.")
@insecure_option
@json_option
def tune(sweep: str, resume: bool, earlier: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Search over the keys of a config, as SWEEP, a YAML file, says."""
    from rich.table import Table

    from metadist.errors import MetadistError
    from metadist.reporting.sweep_page import REPORT_FILE, write_sweep_report
    from metadist.sweeps.directory import BEST_FILE, RESULTS_FILE, SweepDirectory
    from metadist.sweeps.file import load_sweep
    from metadist.sweeps.warm_start import with_first_points, with_saved_first_points
    from metadist.tuning import train_finals
    from metadist.tuning import tune as run_sweep
    from metadist.tuning.progress import score, shown

    settings = load_sweep(sweep)
    if earlier:
        settings = with_first_points(settings, list(earlier))
    elif resume:
        settings = with_saved_first_points(settings)
    run_sweep(settings, resume=resume, address=address, console=progress_console())
    directory = SweepDirectory(settings)
    rows, best = directory.rows(), directory.best()
    if best is None:
        raise MetadistError(
            f"no trial of {directory.path} came to a validation: see the column error of {RESULTS_FILE}."
        )
    finals = train_finals(settings, address=address, console=progress_console())
    if finals is not None:
        write_sweep_report(str(directory.path))
    if as_json:
        print_json(
            {"sweep_dir": str(directory.path), "best": best, "trials": rows, "finals": finals and finals.as_dict()}
        )
        return
    metric, mode = settings.objective.metric, settings.objective.mode
    table = Table("trial", "outcome", "step", metric, *settings.space)
    scored = sorted(
        (row for row in rows if row[metric] is not None), key=lambda row: row[metric], reverse=mode == "max"
    )
    for row in scored + [row for row in rows if row[metric] is None]:
        values = (shown(row[key]) for key in settings.space)
        table.add_row(str(row["trial"]), row["outcome"], str(row["step"]), score(row[metric]), *values)
    result_console().print(table)
    for row in rows:
        if row["error"]:
            click.echo(f"trial {row['trial']} failed: {row['error']}")
    if finals is not None:
        result_console().print(finals.table())
    click.echo(f"all trials   {directory.path / RESULTS_FILE}")
    click.echo(f"best config  {directory.path / BEST_FILE}")
    click.echo(f"report       {directory.path / REPORT_FILE}")
