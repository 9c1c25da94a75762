"""Versions of a run: its training gives version 0, each accepted update adds one, and any can be gone back to.

`versions/0001/` holds a checkpoint and `update.json`; `versions/current.json` names the version in use. Training
neither reads nor writes them: it goes on from its own checkpoints.
"""

import re
from typing import Any

from metadist.checkpoint import Checkpoints
from metadist.distributed.learner import LearnerState
from metadist.errors import RunDirectoryError
from metadist.experiment import Experiment
from metadist.run_directory import RunDirectory

CURRENT = "versions/current.json"
_NAME = re.compile(r"\d{4,}")


class Versions:
    """The versions of one run directory."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory

    @property
    def current(self) -> int:
        """The version in use; 0 for the training's own theta. Raises RunDirectoryError where the file is damaged."""
        if not self._directory.exists(CURRENT):
            return 0
        found = self._directory.read_json(CURRENT)
        number = found.get("version") if isinstance(found, dict) else None
        if not isinstance(number, int) or (number and number not in self.numbers()):
            raise RunDirectoryError(
                f"{self._directory.location}/{CURRENT} names no version of this run. Choose one:"
                f" metadist update {self._directory.location} --rollback 0."
            )
        return number

    def numbers(self) -> list[int]:
        """Of all versions but 0, in order."""
        names = self._directory.names("versions")
        return sorted(
            int(name)
            for name in names
            if _NAME.fullmatch(name) and self._directory.exists(f"versions/{name}/update.json")
        )

    def record(self, number: int) -> dict[str, Any]:
        """What update.json says of a version. Raises RunDirectoryError where there is no such one."""
        if number not in self.numbers():
            has = ", ".join(map(str, [0, *self.numbers()]))
            raise RunDirectoryError(f"{self._directory.location} has no version {number}; it has {has}. Choose one.")
        found: dict[str, Any] = self._directory.read_json(f"{_place(number)}/update.json")
        return found

    def load(self, number: int, experiment: Experiment) -> LearnerState:
        """A version's state, verified as checkpoints are. Raises MetadistError."""
        self.record(number)
        checkpoints = self._checkpoints(number, experiment)
        (step,) = checkpoints.steps()
        return checkpoints.load(step)

    def add(self, state: LearnerState, record: dict[str, Any], experiment: Experiment) -> int:
        """Writes a version and makes it the current one; gives its number. The record comes last: without it,
        what is there does not count."""
        number = max(self.numbers(), default=0) + 1
        self._checkpoints(number, experiment).save(state)
        self._directory.write_json(f"{_place(number)}/update.json", record | {"version": number})
        self.use(number)
        return number

    def use(self, number: int) -> None:
        """Makes a version the current one; 0 is the training's own."""
        if number:
            self.record(number)
        self._directory.make("versions")
        self._directory.write_json(CURRENT, {"version": number})

    def _checkpoints(self, number: int, experiment: Experiment) -> Checkpoints:
        layout = experiment.network.statistics_layout
        return Checkpoints(self._directory, experiment.theta, layout, folder=_place(number))


def _place(number: int) -> str:
    return f"versions/{number:04d}"
