"""`metadist replay`."""

import click

from metadist.commands.output import json_option, print_json, progress_console, result_console


@click.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), required=True, help="As an error names it: from 0.")
@click.option("--chunk", type=click.IntRange(min=0), required=True, help="As an error names it: from 0.")
@click.option("--pdb", "debug", is_flag=True, help="Open Python's debugger at each task that is bad.")
@click.option("--allow-numeric-drift", is_flag=True, help="Replay although this machine computes other bits.")
@json_option
def replay(run: str, step: int, chunk: int, debug: bool, allow_numeric_drift: bool, as_json: bool) -> None:
    """Compute one chunk of RUN, a run directory, again: task by task, in this process.

    Theta is that of the run at this step: the steps since the checkpoint before are repeated, without Ray.
    """
    from metadist.errors import UserError
    from metadist.replay import replay as replay_chunk

    if debug and as_json:
        raise UserError("--pdb and --json cannot go together: the debugger talks on stdout. Leave one of them out.")
    found = replay_chunk(
        run, step=step, chunk=chunk, debug=debug, allow_numeric_drift=allow_numeric_drift, console=progress_console()
    )
    if as_json:
        print_json(found.as_dict())
        return
    result_console().print(found.table())
    start = f"the checkpoint of step {found.from_step}" if found.from_step else "the start"
    click.echo(f"theta is that of {start}" + (f", and {found.steps_replayed} steps" if found.steps_replayed else ""))
