"""`metadist serve`."""

import hashlib
import ipaddress
import os
import secrets
import signal
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from metadist.commands.output import insecure_option, json_option, print_json, progress_console

TOKEN_VARIABLE = "METADIST_SERVE_TOKEN"


@click.command()
@click.argument("run")
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 for everywhere.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--replicas", default=1, show_default=True, type=click.IntRange(min=1), help="Processes, a core each.")
@click.option("--address", metavar="ADDR", help="A Ray cluster to join, instead of $RAY_ADDRESS or a local one.")
@click.option("--step", type=click.IntRange(min=0), help="The checkpoint of this outer step, instead of the newest.")
@click.option("--token-file", metavar="FILE", help="Holds the callers' token; made, with one, where it is missing.")
@click.option("--no-token", is_flag=True, help="Ask for none; only where --host is this machine alone.")
@click.option("--models", metavar="DIR", help="Where support sets are kept.  [default: served/ in a local RUN]")
@click.option("--most-examples", default=1000, show_default=True, type=click.IntRange(min=1), help="Of one request.")
@click.option("--most-megabytes", default=16, show_default=True, type=click.IntRange(min=1), help="Of one request.")
@click.option("--timeout", default=30.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds a request.")
@insecure_option
@json_option
def serve(
    run: str,
    host: str,
    port: int,
    replicas: int,
    address: str | None,
    step: int | None,
    token_file: str | None,
    no_token: bool,
    models: str | None,
    most_examples: int,
    most_megabytes: int,
    timeout: float,
    as_json: bool,
) -> None:
    """Serve RUN over HTTP: send a support set, get an adapted model's id and predictions.

    The token is $METADIST_SERVE_TOKEN, else that of --token-file (default ~/.metadist/serve_token). Ctrl-C stops.
    """
    from metadist.adaptation import load
    from metadist.errors import UserError
    from metadist.run_directory import RunDirectory

    if not find_spec("fastapi"):
        raise UserError("metadist serve needs the extra `serve`: pip install 'metadist[serve]'.")
    if no_token and not _is_this_machine(host):
        raise UserError(f"--no-token would let everybody who reaches {host} use this server. Leave it out.")
    load(run, step=step)  # What is wrong with the run is said now, and not by a replica.
    place = RunDirectory(run)
    if models is None and not place.is_local:
        raise UserError("--models must be given, since RUN is in an object store: a directory that all replicas share.")
    directory = Path(models or place.local / "served").resolve()
    token, where = (None, None) if no_token else _token(token_file)
    from metadist.distributed.serving import ServerSettings, start
    from metadist.serving.limits import Limits

    limits = Limits(
        request_bytes=most_megabytes * 2**20,
        support_examples=most_examples,
        query_examples=most_examples,
        seconds=timeout,
    )
    settings = ServerSettings(
        run_dir=place.location if not place.is_local else str(place.local.resolve()),
        step=step,
        models_directory=str(directory),
        host=host,
        port=port,
        token_sha256=hashlib.sha256(token.encode()).hexdigest() if token else None,
        replicas=replicas,
        address=address,
        limits=limits,
    )
    stopped = threading.Event()
    stop = start(settings, progress_console())
    # After Ray has started, which has a handler of its own for SIGTERM.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        _say(f"http://{host}:{port}", where, as_json)
        stopped.wait()
    finally:
        stop()


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _token(file: str | None) -> tuple[str, str]:
    """The token, and where it is from. A file that is not there is made, for its owner alone."""
    from metadist.errors import UserError
    from metadist.files import writing

    found = os.environ.get(TOKEN_VARIABLE)
    if found and file is None:
        return found, f"${TOKEN_VARIABLE}"
    place = Path(file) if file else Path.home() / ".metadist" / "serve_token"
    if not place.exists():
        with writing(str(place)):
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                stream.write(secrets.token_urlsafe(32) + "\n")
    if place.stat().st_mode & 0o077:
        raise UserError(
            f"{place} can be read by others than its owner. Permit it to the owner alone: chmod 600 {place}"
        )
    token = place.read_text().strip()
    if len(token) < 16:
        raise UserError(
            f"{place} must hold a token of 16 characters or more, got {len(token)}. Remove it for a new one."
        )
    return token, str(place)


def _say(url: str, token_from: str | None, as_json: bool) -> None:
    said: dict[str, Any] = {"url": url, "documentation": f"{url}/docs", "token": token_from}
    if as_json:
        print_json(said)
        return
    click.echo(f"serving        {url}")
    click.echo(f"documentation  {url}/docs")
    click.echo(f"token          {f'in {token_from}' if token_from else 'none: everybody on this machine may call'}")
