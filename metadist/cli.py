"""The command line: `metadist` and `python -m metadist`.

Exit status: 0 done; 2 the user's input is wrong; 1 a failure of ours; 130 interrupted.
"""

import click

from metadist import __version__
from metadist.commands.adapt import adapt
from metadist.commands.compare import compare
from metadist.commands.data import data
from metadist.commands.doctor import doctor
from metadist.commands.evaluate import evaluate
from metadist.commands.predict import predict
from metadist.commands.replay import replay
from metadist.commands.report import report
from metadist.commands.serve import serve
from metadist.commands.similar import similar
from metadist.commands.submit import submit
from metadist.commands.train import train
from metadist.commands.tune import tune
from metadist.commands.update import update
from metadist.errors import MetadistError


class _Group(click.Group):
    """Turns our errors into one message and an exit status; anything else is a bug and keeps its traceback."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except MetadistError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
            context.exit(error.exit_status)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            context.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="metadist")
def cli() -> None:
    """Distributed meta-training on Ray: the same bits for any number of workers, failure or resume."""


WORK_WITH_RUNS = (train, submit, evaluate, adapt, similar, update, predict, serve, compare, tune, report, replay)
for command in (*WORK_WITH_RUNS, data, doctor):
    cli.add_command(command)


def main() -> None:
    """Runs the command line and exits."""
    cli(prog_name="metadist")
