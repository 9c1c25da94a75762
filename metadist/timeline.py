"""Where the time of a run's steps goes: timeline.jsonl, for `timeline.png` and for tuning a cluster."""

import json
import time
from pathlib import Path

from metadist.distributed.seconds import Seconds
from metadist.files import writing
from metadist.tracking import open_after

TIMELINE_FILE = "timeline.jsonl"


class TimeLine:
    """Appends a line every so many steps, each the mean of the steps since the line before.

    `wall` is from step to step, without validation and without handing over a checkpoint; `waiting` is
    what is left of it beside the parts of `Seconds`: for the slowest adapter, and for data on their way.
    Unlike metrics these numbers are no two times the same.
    """

    def __init__(self, directory: Path, first_step: int, log_every: int) -> None:
        self._path = directory / TIMELINE_FILE
        self._log_every = log_every
        self._steps, self._wall, self._parts = 0, 0.0, Seconds()
        with writing(str(self._path)):
            self._file = open_after(self._path, first_step)
        self.restart()

    def restart(self) -> None:
        """The next step begins now."""
        self._since = time.perf_counter()

    def step(self, step: int, parts: Seconds, last: bool) -> dict[str, float] | None:
        """`step` steps are done; gives the values of the line, where one was due."""
        now = time.perf_counter()
        self._steps += 1
        self._wall += now - self._since
        self._parts += parts
        self._since = now
        if step % self._log_every and not last:
            return None
        wall = self._wall / self._steps
        means = {name: total / self._steps for name, total in self._parts._asdict().items()}
        values = {"wall": wall, **means, "waiting": max(0.0, wall - sum(means.values()))}
        self._steps, self._wall, self._parts = 0, 0.0, Seconds()
        with writing(str(self._path)):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
        return values

    def rewind(self, step: int) -> None:
        """Forgets the lines of steps after `step`, which will be made again."""
        with writing(str(self._path)):
            self._file.close()
            self._file = open_after(self._path, step)
        self.restart()

    def flush(self) -> None:
        with writing(str(self._path)):
            self._file.flush()

    def close(self) -> None:
        with writing(str(self._path)):
            self._file.close()


def read_timeline(directory: Path) -> list[dict[str, float]]:
    """The lines of timeline.jsonl; none where the run has not been timed."""
    path = directory / TIMELINE_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
