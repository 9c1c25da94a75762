"""`metadist evaluate`."""

from typing import Any

import click

from metadist.commands.output import json_option, print_json, progress_console, result_console
from metadist.commands.train import workers_option


@click.command()
@click.argument("run")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Instead of the config's evaluation.split.")
@click.option("--episodes", type=click.IntRange(min=1), help="Instead of evaluation.episodes (600).")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Instead of evaluation.seed: another list of episodes.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step, instead of the newest.")
@click.option("--workers", callback=workers_option, metavar="N|MIN:MAX", help="Adapters; 0 evaluates in this process.")
@click.option("--address", metavar="ADDR", help="A Ray cluster to join, instead of $RAY_ADDRESS or a local one.")
@json_option
def evaluate(
    run: str,
    split: str | None,
    episodes: int | None,
    seed: int | None,
    step: int | None,
    workers: Any,
    address: str | None,
    as_json: bool,
) -> None:
    """Evaluate RUN, a run directory: adapt to a fixed list of episodes, score after each inner step."""
    from metadist.evaluation import evaluate as evaluate_run
    from metadist.pictures import picture_of
    from metadist.run_directory import RunDirectory

    evaluation = evaluate_run(
        run,
        split=split,
        episodes=episodes,
        seed=seed,
        step=step,
        num_workers=workers,
        address=address,
        console=progress_console(),
    )
    if as_json:
        print_json(evaluation.as_dict())
        return
    result_console().print(evaluation.table())
    directory = RunDirectory(run)
    if directory.is_local:
        click.echo(f"picture  {picture_of(evaluation, directory.local)}")
