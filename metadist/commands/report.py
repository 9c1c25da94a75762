"""`metadist report`."""

import click

from metadist.commands.output import json_option, print_json, progress_console


@click.command()
@click.argument("run")
@click.option(
    "--episodes", type=click.IntRange(min=3), default=100, show_default=True, help="Test episodes to adapt to."
)
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step, instead of the newest.")
@json_option
def report(run: str, episodes: int, step: int | None, as_json: bool) -> None:
    """Write RUN/report.html: one page that tells what RUN, a run directory, learned and what to try next.

    Of the directory of a sweep: where its good settings lie, how its trials went, and what mattered.
    """
    from metadist.reporting.sweep_page import write_sweep_report
    from metadist.reporting.sweep_record import is_sweep

    if is_sweep(run):
        place = write_sweep_report(run)
        print_json({"report": place}) if as_json else click.echo(f"report   {place}")
        return
    from metadist.reporting.report import report as write_report

    written = write_report(run, episodes=episodes, step=step, console=progress_console())
    if as_json:
        print_json(written.as_dict())
        return
    for note in written.findings.notes:
        click.echo(f"note     {note}")
    for advice in written.advice:
        click.echo(f"next     {advice.text}")
    click.echo(f"report   {written.path}")
