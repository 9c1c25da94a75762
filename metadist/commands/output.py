"""What every command shares: where text goes, and `--json`."""

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])


def json_option(function: F) -> F:
    """`--json`: one JSON object on stdout, everything else on stderr."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, the rest on stderr.")(
        function
    )


def insecure_option(function: F) -> F:
    """`--insecure`, of every command that joins a cluster: until the command ends, open ones are used too."""

    def set_variable(context: click.Context, parameter: click.Parameter, value: bool) -> None:
        del parameter
        if value and os.environ.get("METADIST_INSECURE") != "1":
            os.environ["METADIST_INSECURE"] = "1"
            context.call_on_close(lambda: os.environ.pop("METADIST_INSECURE", None))

    return click.option(
        "--insecure",
        is_flag=True,
        expose_value=False,
        callback=set_variable,
        help="Use a cluster elsewhere that asks for no token: whoever reaches it can run code there.",
    )(function)


def invert_option(function: F) -> F:
    """`--invert`, of every command that reads a person's own images."""
    return click.option("--invert", is_flag=True, help="Take the images' negatives: ink on paper for light on dark.")(
        function
    )


def progress_console() -> Console:
    """For progress and notes: stderr, so that stdout holds results alone."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def result_console() -> Console:
    """For results: stdout."""
    return Console(soft_wrap=True, highlight=False)


def print_json(value: dict[str, Any]) -> None:
    """The one JSON object of a command."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))
