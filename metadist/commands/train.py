"""`metadist train`."""

import dataclasses
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from metadist.commands.output import insecure_option, json_option, print_json, progress_console, result_console

if TYPE_CHECKING:
    from metadist.config import Config

F = TypeVar("F", bound=Callable[..., Any])


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


def run_options(function: F) -> F:
    """CONFIG and the options that a run has wherever it is trained: `settings_of` and `train_arguments` take them."""
    options = [
        click.argument("config"),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: training.steps=3000."
        ),
        click.option("--run-dir", metavar="DIR|URI", help="The run directory, instead of run.storage_path/run.name."),
        click.option(
            "--resume",
            type=click.Choice(["auto", "never", "must"]),
            default="auto",
            show_default=True,
            help="Go on from the run directory's last checkpoint.",
        ),
        click.option(
            "--workers",
            callback=workers_option,
            metavar="N|MIN:MAX",
            help="Adapters; 0 trains in this process, without Ray.",
        ),
        click.option(
            "--allow-numeric-drift",
            is_flag=True,
            help="Resume although versions or hardware compute other bits.",
        ),
        click.option("--evaluate/--no-evaluate", "with_evaluation", default=True, help="Evaluate after the last step."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def settings_of(config: str, options: dict[str, Any]) -> "Config":
    """The config as the options change it."""
    from metadist.config import load_config
    from metadist.errors import UserError

    settings = load_config(config, options["overrides"])
    scaling, run, run_dir = settings.scaling, settings.run, options["run_dir"]
    if options["workers"] is not None:
        scaling = dataclasses.replace(scaling, num_workers=options["workers"])
    if run_dir is not None:
        parent, _, name = run_dir.rstrip("/").rpartition("/")
        if name in ("", ".", ".."):
            raise UserError(f"--run-dir must end in the run's own name, got {run_dir!r}. For example: runs/my_run.")
        run = dataclasses.replace(run, storage_path=parent or ("/" if run_dir.startswith("/") else "."), name=name)
    return dataclasses.replace(settings, scaling=scaling, run=run)


def train_arguments(config: str, options: dict[str, Any]) -> list[str]:
    """Arguments with which `metadist train` has the same options."""
    arguments = [config]
    if options["run_dir"] is not None:
        arguments += ["--run-dir", options["run_dir"]]
    arguments += [part for override in options["overrides"] for part in ("--set", override)]
    workers = options["workers"]
    if workers is not None:
        arguments += ["--workers", ":".join(map(str, workers)) if isinstance(workers, tuple) else str(workers)]
    arguments += ["--resume", options["resume"]] if options["resume"] != "auto" else []
    arguments += ["--allow-numeric-drift"] if options["allow_numeric_drift"] else []
    return arguments + (["--no-evaluate"] if not options["with_evaluation"] else [])


@click.command()
@run_options
@click.option("--address", metavar="ADDR", help="A Ray cluster to join, instead of $RAY_ADDRESS or a local one.")
@insecure_option
@json_option
def train(config: str, address: str | None, as_json: bool, **options: Any) -> None:
    """Meta-train CONFIG, a YAML file."""
    from metadist.errors import InterruptedRun
    from metadist.pictures import picture_of
    from metadist.run_directory import RunDirectory
    from metadist.training import MetaTrainer

    settings = settings_of(config, options)
    if address is not None:
        settings = dataclasses.replace(settings, scaling=dataclasses.replace(settings.scaling, address=address))
    trainer = MetaTrainer(
        settings,
        resume=options["resume"],
        allow_numeric_drift=options["allow_numeric_drift"],
        console=progress_console(),
    )
    try:
        result = trainer.fit(evaluate=options["with_evaluation"])
    except InterruptedRun as interrupted:
        # Whatever it was, it is a run to go on with now.
        same = options | {"run_dir": settings.run_directory, "resume": "auto"}
        again = ["metadist", "train", *train_arguments(config, same)]
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
