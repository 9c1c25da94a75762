"""`metadist submit`."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metadist.commands.output import insecure_option, json_option, print_json
from metadist.commands.train import run_options, settings_of, train_arguments

if TYPE_CHECKING:
    from metadist.config import Config
    from metadist.jobs import Job, JobServer


@click.command()
@run_options
@click.option("--address", metavar="URL", help="The cluster's dashboard: http://HOST:8265.  [$RAY_API_SERVER_ADDRESS]")
@click.option("--wait/--no-wait", default=True, help="Follow the job's output until it ends.  [default: wait]")
@click.option("--skip-resource-check", is_flag=True, help="For clusters that get nodes when they are asked for.")
@insecure_option
@json_option
def submit(
    config: str,
    address: str | None,
    wait: bool,
    skip_resource_check: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Meta-train CONFIG on a cluster, as a Ray job, with the files of this directory.

    Submitting the same again after a failure goes on from the last checkpoint. Where the cluster asks for
    a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
    """
    settings = settings_of(config, options)
    inside = _within_directory(config)
    _check_reachable_from_elsewhere(settings)
    from metadist.jobs import JobServer

    server = JobServer(address)
    if not skip_resource_check:
        server.check_fits(settings)
    # In the job, this is the cluster that it runs on.
    command = ["python", "-m", "metadist", "train", *train_arguments(inside, options), "--address", "auto"]
    job = server.submit(command, Path.cwd(), {"run_directory": settings.run_directory})
    click.echo(f"job            {job.id}\nrun directory  {settings.run_directory}", err=as_json)
    status, exit_status = _follow(server, job) if wait else (server.status(job), 0)
    if as_json:
        run_dir = settings.run_directory
        print_json({"job_id": job.id, "run_dir": run_dir, "status": status, "exit_status": exit_status})
    elif not wait:
        click.echo(_how_to_get_back(job))
    raise SystemExit(exit_status)


def _follow(server: "JobServer", job: "Job") -> tuple[str, int]:
    """The job's status and the exit status to end with; 130 where Ctrl-C leaves the job to itself."""
    from metadist.errors import ClusterError

    try:
        server.follow(job, lambda text: click.echo(text, nl=False, err=True))
        status, code, message = server.wait(job)
    except KeyboardInterrupt:
        click.echo(f"\nThe job goes on without this terminal.\n{_how_to_get_back(job)}", err=True)
        return "RUNNING", 130
    except ClusterError as error:
        raise ClusterError(f"{error} The job may well go on.\n{_how_to_get_back(job)}") from None
    if code:
        again = "The same command again goes on from the last checkpoint."
        click.echo(f"Job {job.id} ended as {status}: {message.strip() or 'no reason given'}\n{again}", err=True)
    return status, code


def _how_to_get_back(job: "Job") -> str:
    return f"attach again   {job.attach_command}\nstop           {job.stop_command}"


def _within_directory(config: str) -> str:
    """The config's path from this directory, which is what the cluster gets."""
    from metadist.errors import UserError

    path = os.path.relpath(Path(config).resolve(), Path.cwd().resolve())
    if path.startswith(os.pardir):
        raise UserError(
            f"CONFIG must lie in this directory, whose files the job gets, got {config!r}. Run the command from your"
            " project's directory."
        )
    return Path(path).as_posix()


def _check_reachable_from_elsewhere(settings: "Config") -> None:
    """Raises UserError for paths that only this machine, or only the job's own copy of the directory, knows."""
    from metadist.errors import UserError

    if not _is_absolute(settings.run.storage_path):
        raise UserError(
            f"run.storage_path must be absolute or a URI for a job, got {settings.run.storage_path!r}: a relative one"
            " lies in the job's temporary directory and is lost with it. Give --run-dir s3://BUCKET/NAME, or a path on"
            " a file system that the cluster's nodes share."
        )
    pool = getattr(settings.task, "pool", None)
    if isinstance(pool, str) and not _is_absolute(pool):
        raise UserError(
            f"task.pool must be absolute or a URI for a job, got {pool!r}: data are not sent to the cluster. Put the"
            f" file where its nodes can read it, and give --set {shlex.quote(f'task.pool=s3://BUCKET/{Path(pool).name}')}."
        )


def _is_absolute(path: str) -> bool:
    return "://" in path or path.startswith(("/", "~"))
