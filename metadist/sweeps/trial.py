"""A trial of a sweep: one meta-training that tells its validations, and tells them again when it is begun again."""

import json
import math
from collections.abc import Callable
from typing import Any, ClassVar

from rich.console import Console

from metadist.callbacks import Callback
from metadist.config import Config
from metadist.errors import ConfigError, MetadistError, NonFiniteError, RunDirectoryError
from metadist.run_directory import RunDirectory
from metadist.training import MetaTrainer

REPORTS_FILE = "reports.json"
FAILURE_FILE = "failure.json"
OUTCOME_FILE = "outcome.json"
Report = dict[str, Any]
"""`step`, `loss`, and `accuracy` where there are classes."""


class TrialFailedError(MetadistError):
    """A trial cannot be finished, and would end the same way if it were begun again."""


def run_trial(config: Config, tell: Callable[[Report], None]) -> None:
    """Trains `config` in its run directory and tells each validation, once, after it has been written there.

    Where the run directory holds reports, they are told first, without computing anything; training then goes on
    from the last checkpoint. So a scheduler that hears a trial for the second time hears the same. Raises
    TrialFailedError where the config's values do not go together or its loss stops being finite: at once, if that
    was seen before.
    """
    directory = RunDirectory(config.run_directory)
    reports = read_reports(directory)
    for report in reports:
        tell(report)
    failure = read_failure(directory)
    if failure is not None:
        raise TrialFailedError(failure)
    if read_outcome(directory) in ("finished", "stopped"):
        return
    told = len(reports)

    try:
        teller = _Teller(config, directory, reports, tell)
        MetaTrainer(config, console=Console(quiet=True), callbacks=[teller]).fit(evaluate=False)
    except (NonFiniteError, ConfigError) as error:
        failure = f"{type(error).__name__}: {error}"
        directory.create()
        directory.write_json(FAILURE_FILE, {"error": failure})
        raise TrialFailedError(failure) from error
    if len(reports) > told:
        tell(reports[-1])


class _Teller(Callback):
    """Writes validations down, then tells them: each when its checkpoint is there, where it has one.

    A scheduler may end this process while it is told, or have another trial go on from that checkpoint.
    """

    awaits_checkpoints: ClassVar[bool] = True

    def __init__(
        self, config: Config, directory: RunDirectory, reports: list[Report], tell: Callable[[Report], None]
    ) -> None:
        self._steps = config.training.steps
        self._checkpoint_every = config.run.checkpoint_config.checkpoint_frequency
        self._directory, self._reports, self._tell = directory, reports, tell
        self._waiting: Report | None = None

    def on_evaluation(self, step: int, split: str, scores: dict[str, float]) -> None:
        if split != "val" or (self._reports and step <= self._reports[-1]["step"]):
            return
        if not math.isfinite(scores["loss"]):
            raise NonFiniteError(f"step {step}: the validation loss is {scores['loss']}")
        report = {"step": step} | {name: value for name, value in scores.items() if math.isfinite(value)}
        if step % self._checkpoint_every and step < self._steps:
            self._write_and_tell(report)
        else:
            self._waiting = report

    def on_checkpoint(self, step: int) -> None:
        if self._waiting is not None:
            report, self._waiting = self._waiting, None
            self._write_and_tell(report)

    def _write_and_tell(self, report: Report) -> None:
        self._reports.append(report)
        self._directory.write_json(REPORTS_FILE, self._reports)
        # The last one is told when everything else is written too.
        if report["step"] < self._steps:
            self._tell(report)


def read_reports(directory: RunDirectory) -> list[Report]:
    """The validations of a trial so far, by step."""
    if not directory.exists(REPORTS_FILE):
        return []
    reports = directory.read_json(REPORTS_FILE)
    if not isinstance(reports, list):
        raise RunDirectoryError(f"{directory.location}/{REPORTS_FILE}: must be a list. Remove the trial's directory.")
    return reports


def read_failure(directory: RunDirectory) -> str | None:
    """Why a trial cannot be finished; None where nothing is known against it."""
    if not directory.exists(FAILURE_FILE):
        return None
    return str(json.loads(directory.read(FAILURE_FILE))["error"])


def read_error(directory: RunDirectory) -> str | None:
    """Why a trial failed: that it cannot be finished, or what ended its process too often; None where it did not."""
    failure = read_failure(directory)
    if failure is not None or not directory.exists(OUTCOME_FILE):
        return failure
    error: str | None = json.loads(directory.read(OUTCOME_FILE)).get("error")
    return error


def read_outcome(directory: RunDirectory) -> str | None:
    """How a trial ended, as the sweep wrote it down; None where it goes on."""
    if not directory.exists(OUTCOME_FILE):
        return None
    return str(json.loads(directory.read(OUTCOME_FILE))["outcome"])
