"""What a run directory holds: config, metrics, evaluation, fingerprint, and when its steps were made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metadist.config import OWN_OBJECT
from metadist.config_file import parse_document
from metadist.errors import RunDirectoryError
from metadist.evaluation import read_config_text
from metadist.files import parse_json
from metadist.run_directory import RunDirectory
from metadist.tracking import METRICS_FILE

EVENTS = "tensorboard"
_EVALUATION_KEYS = {"split", "episodes", "step", "batch_norm", "inner_steps", "accuracy", "loss", "ece", "policies"}


@dataclass(frozen=True)
class Record:
    """A run as it was written down; nothing here is computed again."""

    location: str
    config: dict[str, Any]
    """config.yaml as plain values."""
    config_text: str
    trained: list[dict[str, Any]]
    """The lines of metrics.jsonl that are of training steps, in order; likewise those of validations."""
    validated: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    fingerprint: dict[str, Any] | None
    sessions: list[list[tuple[int, float]]]
    """By session (a start or a resume): (step, Unix time) of the steps that were logged. Empty without TensorBoard."""
    notes: list[str]
    """What is missing or damaged, in sentences."""

    @property
    def name(self) -> str:
        return self.location.rstrip("/").rpartition("/")[2]

    @property
    def score(self) -> str:
        """ "accuracy", or "loss" in regression."""
        scored = [line for line in self.trained if line.get("accuracy") is not None]
        return "accuracy" if scored or (self.evaluation or {}).get("accuracy") else "loss"

    @property
    def last_step(self) -> int:
        """The last step that was logged, 0 where none was."""
        return max((line["step"] for line in [*self.trained, *self.validated]), default=0)

    @property
    def seconds(self) -> float | None:
        """From the first to the last logged step of each session, together; None where no times were kept."""
        return sum(session[-1][1] - session[0][1] for session in self.sessions) if self.sessions else None

    def setting(self, section: str, key: str) -> Any:
        """A setting of config.yaml, None where it has none of that name."""
        return (self.config.get(section) or {}).get(key)

    @property
    def own_objects(self) -> list[str]:
        """Sections that were objects of the program that made the run."""
        return [section for section in ("task", "model", "algorithm") if self.setting(section, "name") == OWN_OBJECT]


def read_record(directory: RunDirectory) -> Record:
    """Reads all of it. Raises RunDirectoryError where this is no run directory, ConfigError for a torn config."""
    text = read_config_text(directory)
    config = parse_document(text, f"{directory.location}/config.yaml").data
    notes: list[str] = []
    lines = _metric_lines(directory, notes)
    evaluation = _json(directory, "evaluation.json", notes)
    if evaluation is not None and not evaluation.keys() >= _EVALUATION_KEYS:
        missing = ", ".join(sorted(_EVALUATION_KEYS - evaluation.keys()))
        raise RunDirectoryError(
            f"{directory.location}/evaluation.json: has no {missing}. Evaluate again:"
            f" metadist evaluate {directory.location}"
        )
    fingerprint = _json(directory, "fingerprint.json", notes)
    sessions = _sessions(directory)
    if evaluation is None:
        notes.append(f"There is no evaluation yet: `metadist evaluate {directory.location}`")
    if not lines:
        notes.append("No training step was logged yet.")
    elif not sessions:
        notes.append("There are no TensorBoard events, so it is not known when the steps were made.")
    return Record(
        location=directory.location,
        config=config,
        config_text=text,
        trained=[line for line in lines if "loss" in line],
        validated=[line for line in lines if "val_loss" in line],
        evaluation=evaluation,
        fingerprint=fingerprint,
        sessions=sessions,
        notes=notes,
    )


def _metric_lines(directory: RunDirectory, notes: list[str]) -> list[dict[str, Any]]:
    if not directory.exists(METRICS_FILE):
        return []
    lines, torn = [], 0
    for line in directory.read(METRICS_FILE).decode(errors="replace").splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            torn += 1
            continue
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            torn += 1
            continue
        lines.append(value)
    if torn:
        notes.append(f"{METRICS_FILE} has {torn} torn line{'s' * (torn > 1)}, left out here; a resume cuts them away.")
    return lines


def _json(directory: RunDirectory, name: str, notes: list[str]) -> dict[str, Any] | None:
    """A JSON object that may be missing; one that is there and damaged is an error."""
    if not directory.exists(name):
        if name == "fingerprint.json":
            notes.append("fingerprint.json is missing: it is not known on what the run was computed.")
        return None
    value = directory.read_json(name)
    if not isinstance(value, dict):
        raise RunDirectoryError(f"{directory.location}/{name}: must hold a JSON object. Restore or remove it.")
    return value


def _sessions(directory: RunDirectory) -> list[list[tuple[int, float]]]:
    """Event files are read where they are, so only from a local disk."""
    if not directory.is_local:
        return []
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = []
    for path in sorted((Path(directory.path) / EVENTS).glob("events.*")):
        times: dict[int, float] = {}
        for event in EventFileLoader(str(path)).Load():
            if any(value.tag == "train/loss" for value in event.summary.value):
                times[event.step] = event.wall_time
        if times:
            found.append(sorted(times.items()))
    return found
