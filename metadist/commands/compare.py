"""`metadist compare`."""

from pathlib import Path
from typing import Any

import click

from metadist.commands.output import insecure_option, json_option, print_json, progress_console, result_console
from metadist.commands.train import workers_option


def json_file_option(context: click.Context, parameter: click.Parameter, value: str | None) -> Path | None:
    """A file's name that ends in .json."""
    del context, parameter
    if value is not None and (Path(value).suffix != ".json" or Path(value).is_dir()):
        raise click.BadParameter(f"must be a file name ending in .json, got {value!r}. Such as: results/compare.json")
    return None if value is None else Path(value)


@click.command()
@click.argument("config_or_run", nargs=-1, required=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of every config given.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Instead of the first one's.")
@click.option("--episodes", type=click.IntRange(min=1), help="Instead of the first one's evaluation.episodes.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Instead of the first one's evaluation.seed.")
@click.option("--workers", callback=workers_option, metavar="N|MIN:MAX", help="Adapters; 0 needs no Ray.")
@click.option("--address", metavar="ADDR", help="A Ray cluster to join, instead of $RAY_ADDRESS or a local one.")
@click.option(
    "--out",
    callback=json_file_option,
    metavar="FILE.json",
    help="Write the JSON object there, and a picture beside it (FILE.png).",
)
@insecure_option
@json_option
def compare(
    config_or_run: tuple[str, ...],
    overrides: tuple[str, ...],
    split: str | None,
    episodes: int | None,
    seed: int | None,
    workers: Any,
    address: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare configs and run directories on the same episodes, the others against the first.

    A config is trained first, gone on with, or taken as it is where its run is finished.
    """
    import json

    from metadist.comparison import compare as compare_runs
    from metadist.errors import InterruptedRun
    from metadist.files import replacing, writing
    from metadist.pictures import draw_comparison

    if out is not None:
        with writing(str(out)):  # Before anything is trained.
            out.parent.mkdir(parents=True, exist_ok=True)
    try:
        comparison = compare_runs(
            config_or_run,
            overrides=overrides,
            split=split,
            episodes=episodes,
            seed=seed,
            num_workers=workers,
            address=address,
            console=progress_console(),
        )
    except InterruptedRun as interrupted:
        raise InterruptedRun(f"{interrupted} Run the same command again to go on.") from None
    if out is not None:
        with replacing(out) as partial:
            partial.write_text(json.dumps(comparison.as_dict(), indent=2) + "\n")
        picture = draw_comparison(comparison, out.with_suffix(".png"))
    if as_json:
        print_json(comparison.as_dict())
        return
    result_console().print(comparison.table())
    if out is not None:
        click.echo(f"JSON     {out}\npicture  {picture}")
