"""bad_episodes.jsonl: the episodes that a run left out of its steps, and how many of them are too many."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metadist.core.bad_episode import BadEpisode
from metadist.core.plan import Plan
from metadist.errors import BadEpisodesError
from metadist.files import writing
from metadist.sections import TrainingSettings
from metadist.tracking import open_after

BAD_EPISODES_FILE = "bad_episodes.jsonl"
STEPS = 100
"""Over which the share of bad episodes is taken."""


class BadEpisodes:
    """Appends a line for each bad episode, with its `step` as in its key, counted from 0."""

    def __init__(self, directory: Path, first_step: int, training: TrainingSettings) -> None:
        self._path, self._training = directory / BAD_EPISODES_FILE, training
        self._file: Any = None
        if self._path.exists():
            self._open_before(first_step)
        self._at_steps = [line["step"] for line in read_bad_episodes(directory)]

    @property
    def count(self) -> int:
        """In the whole run so far."""
        return len(self._at_steps)

    def add(self, plan: Plan, episodes: Sequence[BadEpisode]) -> None:
        """Notes what a step left out. Raises BadEpisodesError where it is too much by `training.max_bad_episodes`."""
        if not episodes:
            return
        with writing(str(self._path)):
            if self._file is None:
                self._open_before(plan.step)
            for episode in episodes:
                line = {"step": plan.step, "chunk": episode.chunk, "task": str(episode.key)}
                line |= {"source": episode.source, "reason": episode.reason}
                self._file.write(json.dumps(line) + "\n")
        self._at_steps += [plan.step] * len(episodes)
        recent = sum(step > plan.step - STEPS for step in self._at_steps)
        if recent > self._training.max_bad_episodes * STEPS * plan.num_tasks:
            self.flush()
            first = episodes[0]
            raise BadEpisodesError(
                f"step {plan.step}, chunk {first.chunk}, task {first.key}, task source {first.source}: {first.reason}."
                f" {recent} tasks of the last {min(STEPS, plan.step + 1)} steps are bad, more than"
                f" training.max_bad_episodes = {self._training.max_bad_episodes:g} of {STEPS} steps' tasks. They are in"
                f" {self._path.name}; correct the source, or raise that key, and resume the run."
            )

    def rewind(self, step: int) -> None:
        """Forgets what was found after `step` steps, which will be found again."""
        if self._file is not None:
            with writing(str(self._path)):
                self._file.close()
            self._open_before(step)
        self._at_steps = [found for found in self._at_steps if found < step]

    def flush(self) -> None:
        if self._file is not None:
            with writing(str(self._path)):
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with writing(str(self._path)):
                self._file.close()

    def _open_before(self, step: int) -> None:
        with writing(str(self._path)):
            self._file = open_after(self._path, step - 1, first_step=0)


def read_bad_episodes(directory: Path) -> list[dict[str, Any]]:
    """The lines of bad_episodes.jsonl; none where no episode was bad."""
    path = directory / BAD_EPISODES_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
