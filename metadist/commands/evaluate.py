"""`metadist evaluate`."""

from typing import Any

import click

from metadist.commands.output import insecure_option, json_option, print_json, progress_console, result_console
from metadist.commands.train import workers_option


def shots_option(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    """Numbers with commas between them."""
    del context, parameter
    if value is None:
        return None
    numbers = [number.strip() for number in value.split(",")]
    if not all(number.isdecimal() and int(number) >= 1 for number in numbers):
        raise click.BadParameter(f"must be numbers of at least 1 with commas between, got {value!r}. Such as: 1,5,10")
    return [int(number) for number in numbers]


@click.command()
@click.argument("run")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Instead of the config's evaluation.split.")
@click.option("--episodes", type=click.IntRange(min=1), help="Instead of evaluation.episodes (600).")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Instead of evaluation.seed: another list of episodes.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this step, instead of the newest.")
@click.option(
    "--shots",
    callback=shots_option,
    metavar="K,K,..",
    help="Support sets of these sizes, one after another, instead of task.shots.",
)
@click.option("--workers", callback=workers_option, metavar="N|MIN:MAX", help="Adapters; 0 evaluates in this process.")
@click.option("--address", metavar="ADDR", help="A Ray cluster to join, instead of $RAY_ADDRESS or a local one.")
@insecure_option
@json_option
def evaluate(
    run: str,
    split: str | None,
    episodes: int | None,
    seed: int | None,
    step: int | None,
    shots: list[int] | None,
    workers: Any,
    address: str | None,
    as_json: bool,
) -> None:
    """Evaluate RUN, a run directory: adapt to a fixed list of episodes, score after each inner step."""
    from metadist.evaluation import evaluate as evaluate_run
    from metadist.pictures import picture_against_shots, picture_of
    from metadist.run_directory import RunDirectory
    from metadist.scores import Evaluation
    from metadist.shots import ShotsEvaluation, evaluate_shots

    asked: dict[str, Any] = {"split": split, "episodes": episodes, "seed": seed, "step": step}
    asked |= {"num_workers": workers, "address": address, "console": progress_console()}
    evaluation: Evaluation | ShotsEvaluation
    place = RunDirectory(run)
    if shots is None:
        evaluation = evaluate_run(run, **asked)
        picture = picture_of(evaluation, place.local)
    else:
        evaluation = evaluate_shots(run, shots, **asked)
        picture = picture_against_shots(evaluation.score, place.local)
    if as_json:
        print_json(evaluation.as_dict())
        return
    result_console().print(evaluation.table())
    if place.is_local:
        click.echo(f"picture  {picture}")
