"""What all trackers have in common: which numbers they get, how often, and which run of theirs goes on."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from metadist.callbacks import Callback, Fault, Status
from metadist.run_directory import RunDirectory

if TYPE_CHECKING:
    from metadist.config import Config

IDS_FILE = "trackers.json"
"""The id of this run in each tracker, by its name."""


class Tracker(Callback):
    """Logs every `run.log_every` steps. Derived classes open a run of their library, log numbers and close it."""

    name: str

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._lost: dict[str, int] = {}

    def open(self, run_name: str, known: str | None, config: dict[str, Any]) -> str:
        """Opens the library's run with an id, or a new one where it is None; gives the id."""
        raise NotImplementedError

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs numbers after so many steps, which can be fewer than at the last call."""
        raise NotImplementedError

    def close(self, finished: bool) -> None:
        """Closes the library's run; not `finished` where steps are left to do."""
        raise NotImplementedError

    def on_start(self, config: "Config", run_dir: str, step: int) -> None:
        from metadist.config import config_to_dict

        self._steps, self._log_every = config.training.steps, config.run.log_every
        ids = json.loads(self._directory.read(IDS_FILE)) if self._directory.exists(IDS_FILE) else {}
        settings = config_to_dict(config) | {"run_dir": run_dir}
        # A run that starts anew is a new one there too.
        ids[self.name] = self.open(config.run.name or "metadist", ids.get(self.name) if step else None, settings)
        self._directory.write_json(IDS_FILE, ids)

    def on_step(self, step: int, metrics: dict[str, float], status: Status) -> None:
        if step % self._log_every == 0 or step == self._steps:
            speed = {"tasks_per_second": status.tasks_per_second, "adapters": float(status.num_adapters)}
            self._log(step, _under("train", metrics) | _under("speed", speed))

    def on_evaluation(self, step: int, split: str, scores: dict[str, float]) -> None:
        self._log(step, _under(split, scores))

    def on_fault(self, step: int, fault: Fault, text: str) -> None:
        del text
        self._lost[fault] = self._lost.get(fault, 0) + 1
        self._log(step, {f"faults/{fault}": float(self._lost[fault])})

    def on_end(self, step: int) -> None:
        self.close(step >= self._steps)

    def _log(self, step: int, values: dict[str, float]) -> None:
        # A regression has no accuracy.
        self.log(step, {name: value for name, value in values.items() if not math.isnan(value)})


def _under(group: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": float(value) for name, value in values.items()}


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a resolved config, by keys like `algorithm.inner_lr`."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
