"""Task sources that fail on purpose, and how to find the processes that Ray started for this one."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.keys import TaskKey
from metadist.core.settings import settings
from metadist.tasks.sinusoid import Sinusoid

SINUSOIDS = Sinusoid()


def is_first(marker: Path) -> bool:
    """Whether nobody, in any process, has asked with this marker before; makes the file."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class KillsItsAdapter:
    """Sinusoids; whoever first samples a task of `step` is killed with SIGKILL while it samples."""

    step: int
    marker: Path
    """Made at the first kill, so that there is no second one."""
    source: Any = SINUSOIDS

    @property
    def spec(self) -> EpisodeSpec:
        return self.source.spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        if keys[0].step == self.step and keys[0].split == "train" and is_first(self.marker):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.sample(keys)


@dataclass(frozen=True)
class Sleeps:
    """Sinusoids, 20 ms a chunk; from `step` on one process takes twenty times as long, and another hangs for good."""

    step: int
    directory: Path
    """Where the first process to need it writes that it is the slow one, and the next one that it hangs."""

    @property
    def spec(self) -> EpisodeSpec:
        return SINUSOIDS.spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        if keys[0].split == "train" and keys[0].step > 0:
            time.sleep(0.02)
            if keys[0].step >= self.step:
                if self._is("slow"):
                    time.sleep(0.38)
                elif self._is("hung"):
                    time.sleep(3600)
        return SINUSOIDS.sample(keys)

    def _is(self, role: str) -> bool:
        """Whether this process has a role; the first that asks gets it."""
        try:
            with (self.directory / role).open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            return (self.directory / role).read_text() == str(os.getpid())
        return True


@dataclass(frozen=True)
class Pauses:
    """Sinusoids; whoever first samples a task of `step` takes `seconds` longer, once."""

    step: int
    seconds: float
    marker: Path

    @property
    def spec(self) -> EpisodeSpec:
        return SINUSOIDS.spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        if keys[0].step == self.step and keys[0].split == "train" and is_first(self.marker):
            time.sleep(self.seconds)
        return SINUSOIDS.sample(keys)


@dataclass(frozen=True)
class Raises:
    """Sinusoids, but tasks of `step` raise."""

    step: int

    @property
    def spec(self) -> EpisodeSpec:
        return Sinusoid().spec

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        if keys[0].step == self.step and keys[0].split == "train":
            raise ZeroDivisionError("no such sinusoid")
        return Sinusoid().sample(keys)


@settings
class KillsItsTrial(Sinusoid):
    """Sinusoids, for a sweep; whoever is in step `dies_at` is killed with SIGKILL, so many `times` in all."""

    dies_at: int
    times: int
    log: str
    """A file, to which each process adds the steps that it is in, one a line."""

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        first = keys[0]
        # In a step's second chunk: of the first step, the first one is sampled before a run begins too.
        if first.split == "train" and first.task == len(keys):
            with Path(self.log).open("a+") as file:
                file.seek(0)
                before = file.read().split().count(str(first.step))
                file.write(f"{first.step}\n")
            if first.step == self.dies_at and before < self.times:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(keys)


def processes_named(title: str, ancestor: int) -> list[int]:
    """Process ids whose command line begins with `title` and that descend from `ancestor`."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue  # It ended while we looked.
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])

    def descends(pid: int) -> bool:
        while pid in parents and pid != ancestor:
            pid = parents[pid]
        return pid == ancestor

    return [pid for pid, found in titles.items() if found.startswith(title) and descends(pid)]
