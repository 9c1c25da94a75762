"""`metadist train`."""

import dataclasses
import shlex
from typing import Any

import click

from metadist.commands.output import json_option, print_json, progress_console, result_console


def workers_option(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """A number of adapters, or MIN:MAX."""
    del context, parameter
    if value is None:
        return None
    numbers = value.split(":")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise click.BadParameter(f"must be a number or MIN:MAX, got {value!r}. For example: --workers 2")
    if len(numbers) == 2 and not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise click.BadParameter(f"MIN:MAX needs 1 <= MIN <= MAX, got {value!r}. For example: --workers 1:4")
    return int(value) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))


@click.command()
@click.argument("config")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: training.steps=3000.")
@click.option("--run-dir", metavar="DIR|URI", help="The run directory, instead of run.storage_path/run.name.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never", "must"]),
    default="auto",
    show_default=True,
    help="Go on from the run directory's last checkpoint.",
)
@click.option(
    "--workers", callback=workers_option, metavar="N|MIN:MAX", help="Adapters; 0 trains in this process, without Ray."
)
@click.option("--address", metavar="ADDR", help="A Ray cluster to join, instead of $RAY_ADDRESS or a local one.")
@click.option("--allow-numeric-drift", is_flag=True, help="Resume although versions or hardware compute other bits.")
@click.option("--evaluate/--no-evaluate", "with_evaluation", default=True, help="Evaluate after the last step.")
@json_option
def train(
    config: str,
    overrides: tuple[str, ...],
    run_dir: str | None,
    resume: Any,
    workers: Any,
    address: str | None,
    allow_numeric_drift: bool,
    with_evaluation: bool,
    as_json: bool,
) -> None:
    """Meta-train CONFIG, a YAML file."""
    from metadist.config import load_config
    from metadist.errors import InterruptedRun, UserError
    from metadist.pictures import picture_of
    from metadist.run_directory import RunDirectory
    from metadist.training import MetaTrainer

    settings = load_config(config, overrides)
    scaling, run = settings.scaling, settings.run
    if workers is not None:
        scaling = dataclasses.replace(scaling, num_workers=workers)
    if address is not None:
        scaling = dataclasses.replace(scaling, address=address)
    if run_dir is not None:
        parent, _, name = run_dir.rstrip("/").rpartition("/")
        if name in ("", ".", ".."):
            raise UserError(f"--run-dir must end in the run's own name, got {run_dir!r}. For example: runs/my_run.")
        run = dataclasses.replace(run, storage_path=parent or ("/" if run_dir.startswith("/") else "."), name=name)
    trainer = MetaTrainer(
        dataclasses.replace(settings, scaling=scaling, run=run),
        resume=resume,
        allow_numeric_drift=allow_numeric_drift,
        console=progress_console(),
    )
    try:
        result = trainer.fit(evaluate=with_evaluation)
    except InterruptedRun as interrupted:
        again = ["metadist", "train", config, "--run-dir", trainer.config.run_directory]
        again += [part for override in overrides for part in ("--set", override)]
        again += (
            []
            if workers is None
            else [
                "--workers",
                ":".join(map(str, scaling.worker_limits)) if isinstance(workers, tuple) else str(workers),
            ]
        )
        again += ["--address", address] if address else []
        raise InterruptedRun(f"{interrupted} Go on with:\n  {shlex.join(again)}") from None
    if as_json:
        print_json(result.as_dict())
        return
    if result.evaluation is not None:
        result_console().print(result.evaluation.table())
        directory = RunDirectory(result.run_dir)
        if directory.is_local:
            click.echo(f"picture        {picture_of(result.evaluation, directory.local)}")
    click.echo(f"run directory  {result.run_dir}")
    click.echo(f"theta          sha256 {result.theta_sha256}")
    lost = f", {result.adapters_lost} adapters lost, {result.chunks_recomputed} chunks recomputed"
    click.echo(f"step {result.step}, {result.tasks_per_second:,.0f} tasks/s{lost if result.adapters_lost else ''}")
