"""What a run's task source was like, for where its data are not at hand: adapting to own examples needs no more."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metadist.core.episode import EpisodeBatch, EpisodeSpec
from metadist.core.keys import TaskKey
from metadist.core.task_source import TaskSource, spec_of
from metadist.errors import DataError
from metadist.files import parse_json


@dataclass(frozen=True)
class RememberedSource:
    """The shapes of a source's episodes, and why there are none."""

    spec: EpisodeSpec
    train_spec: EpisodeSpec
    missing: str

    def sample(self, keys: Sequence[TaskKey]) -> EpisodeBatch:
        raise DataError(f"tasks of the run's own are needed, and {self.missing}")


def remembered(source: TaskSource) -> dict[str, Any]:
    """The shapes of a source's episodes, as plain values for JSON."""
    return {"spec": dataclasses.asdict(source.spec), "train_spec": dataclasses.asdict(spec_of(source, "train"))}


def recalled(content: bytes, missing: str) -> RememberedSource:
    """From the JSON of `remembered`. Raises ValueError or TypeError where it is none."""
    found = parse_json(content)
    specs = {
        name: EpisodeSpec(**part | {"input_shape": tuple(part["input_shape"])})
        for name, part in ((name, dict(found[name])) for name in ("spec", "train_spec"))
    }
    return RememberedSource(**specs, missing=missing)
