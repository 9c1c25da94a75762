"""Opening a run directory: a new run, or an earlier one to go on with."""

from typing import Any, Literal

import yaml
from rich.console import Console
from rich.text import Text

from metadist.checkpoint import Checkpoints
from metadist.config import Config, config_to_dict, differences
from metadist.config_file import read_plain_yaml
from metadist.distributed.learner import LearnerState
from metadist.errors import ConfigError, RunDirectoryError
from metadist.experiment import Experiment
from metadist.run_directory import RunDirectory

Resume = Literal["auto", "never", "must"]


def open_run(
    directory: RunDirectory,
    config: Config,
    experiment: Experiment,
    resume: Resume,
    allow_numeric_drift: bool,
    console: Console,
) -> tuple[LearnerState | None, dict[str, Any] | None]:
    """The state to go on from and the numeric fingerprint to keep to; None and None in a new run.

    Writes config.yaml. Raises RunDirectoryError where the directory holds another run.
    """
    asked = config_to_dict(config)
    checkpoints = Checkpoints(directory, experiment.theta, experiment.network.statistics_layout)
    saved_steps = checkpoints.steps()
    if saved_steps and resume == "never":
        raise RunDirectoryError(
            f"{directory.location} holds a run with checkpoints, and --resume never would write over it."
            " Choose another --run-dir, or --resume auto."
        )
    if not saved_steps and resume == "must":
        raise RunDirectoryError(
            f"{directory.location} holds no checkpoint to go on from. Correct --run-dir, or use --resume auto."
        )
    if not saved_steps:
        for place in checkpoints.unfinished():
            console.print(Text(f"{place} has no manifest.json: it was not finished and does not count.", "yellow"))
        _refuse_other_files(directory)
        directory.create()
        directory.write_yaml("config.yaml", asked)
        return None, None
    _refuse_other_run(directory, asked)
    state = checkpoints.load_latest(lambda text: console.print(Text(text, "yellow")))
    assert state is not None
    if state.step > config.training.steps:
        raise RunDirectoryError(
            f"{directory.location} is already at step {state.step}, beyond training.steps = {config.training.steps}."
            " Raise training.steps, or choose another --run-dir."
        )
    expected = None if allow_numeric_drift else _fingerprint(directory)
    directory.write_yaml("config.yaml", asked)
    console.print(Text(f"Going on from step {state.step} of {directory.location}"))
    return state, expected


def _fingerprint(directory: RunDirectory) -> dict[str, Any]:
    try:
        expected = directory.read_json("fingerprint.json")
        if isinstance(expected, dict):
            return expected
    except RunDirectoryError:
        pass
    raise RunDirectoryError(
        f"{directory.location}/fingerprint.json is missing or damaged, so it cannot be told whether this machine"
        " computes the run's bits. Restore it, or resume with --allow-numeric-drift."
    )


def _refuse_other_files(directory: RunDirectory) -> None:
    """A config.yaml that no run has written may be the user's own, with comments."""
    if directory.exists("config.yaml") and not (
        directory.exists("checkpoints") or directory.exists("fingerprint.json")
    ):
        raise RunDirectoryError(
            f"{directory.location} holds a config.yaml that would be written over, and is no run directory."
            " Choose another --run-dir, or move that file away."
        )


def _refuse_other_run(directory: RunDirectory, asked: dict[str, Any]) -> None:
    try:
        different = differences(read_plain_yaml(directory.read("config.yaml").decode(), "config.yaml"), asked)
    except (
        RunDirectoryError,
        ConfigError,
        yaml.YAMLError,
        RecursionError,
        LookupError,
        TypeError,
        AttributeError,
        UnicodeDecodeError,
    ):
        raise RunDirectoryError(
            f"{directory.location}/config.yaml is missing, damaged or of another version, so it cannot be told whether"
            " this is the same run. Restore it, or choose another --run-dir."
        ) from None
    if different:
        raise RunDirectoryError(
            f"{directory.location} holds a run of another config: {'; '.join(different)}."
            " Choose another --run-dir, or use that run's config."
        )
