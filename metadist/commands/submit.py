"""`metadist submit`."""

import re
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from metadist.commands.output import json_option, print_json, progress_console
from metadist.commands.train import workers_option

PROGRESS = re.compile(r"step \d+/\d+  ")


@click.command()
@click.argument("config")
@click.option(
    "--address", metavar="URL", envvar="RAY_API_SERVER_ADDRESS", required=True, help="The Ray dashboard's http address."
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: training.steps=3000.")
@click.option("--run-dir", metavar="DIR|URI", help="The run directory: a URI, or a path that the head sees.")
@click.option(
    "--resume",
    type=click.Choice(["auto", "never", "must"]),
    default="auto",
    show_default=True,
    help="Go on from the run directory's last checkpoint.",
)
@click.option("--workers", callback=workers_option, metavar="N|MIN:MAX", help="Adapters.")
@click.option("--wait/--no-wait", default=True, help="Follow the log until the job ends.")
@json_option
def submit(
    config: str,
    address: str,
    overrides: tuple[str, ...],
    run_dir: str | None,
    resume: str,
    workers: Any,
    wait: bool,
    as_json: bool,
) -> None:
    """Meta-train CONFIG as a job on a Ray cluster; packs the working directory without data and runs."""
    from metadist.commands.train import with_options
    from metadist.config import load_config
    from metadist.errors import InterruptedRun
    from metadist.jobs import Cluster, check_no_token, check_paths

    settings = with_options(load_config(config, overrides), run_dir, workers, None)
    project = Path.cwd()
    packed_config = check_paths(settings, config, project)
    words = ["python", "-m", "metadist", "train", packed_config, "--address", "auto", "--resume", resume]
    words += ["--run-dir", settings.run_directory]
    words += [part for override in overrides for part in ("--set", override)]
    if workers is not None:
        words += ["--workers", ":".join(map(str, workers)) if isinstance(workers, tuple) else str(workers)]
    check_no_token([*words, address], Path(config).read_text(encoding="utf-8"))
    cluster = Cluster(address)
    cluster.check_fits(settings)
    job = cluster.submit(words, project)
    console = progress_console()
    console.print(Text(f"Submitted {job.submission_id}; the run directory is {settings.run_directory}"))
    if wait:
        try:
            with _Log(console) as log:
                cluster.follow(job, log.show)
        except KeyboardInterrupt:
            raise InterruptedRun(
                f"Detached; the job goes on. Attach again with:\n  {job.how_to_attach}\nor stop it with:\n"
                f"  {job.how_to_stop}"
            ) from None
    status, exit_status, message = cluster.outcome(job)
    result = {"submission_id": job.submission_id, "address": address, "run_dir": settings.run_directory}
    if as_json:
        print_json(result | {"status": status, "exit_status": exit_status})
    else:
        click.echo(f"run directory  {settings.run_directory}")
        click.echo(f"job            {job.submission_id} {status.lower()}")
        if not wait:
            click.echo(f"attach         {job.how_to_attach}\nstop           {job.how_to_stop}")
    if wait and status != "SUCCEEDED":
        if not as_json:
            click.echo(f"{message}\nThe same command again goes on from the last checkpoint.", err=True)
        raise SystemExit(2 if exit_status == 2 else 1)


class _Log:
    """A job's log; its progress lines overwrite each other on a terminal, as those of `metadist train` do."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> "_Log":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, line: str) -> None:
        text = Text.from_ansi(line)
        if self._live and PROGRESS.match(text.plain):
            self._live.update(text)
        else:
            self._console.print(text)
