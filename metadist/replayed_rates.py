"""`outer.lr_schedule: from RUN`: the rates of another run, from its first step to its last.

A sweep of scheduler `pbt` or `pb2` leaves schedules: in each trial's run directory, and the best one's in best.yaml.
What is read replaces the text, so that a resolved config depends on no other run.
"""

from typing import Any

import yaml

from metadist.config_file import Document, read_plain_yaml
from metadist.errors import ConfigError, RunDirectoryError, first_line
from metadist.run_directory import RunDirectory

RATES = (("outer", "lr"), ("outer", "lr_schedule"), ("algorithm", "inner_lr"), ("algorithm", "inner_lr_schedule"))
_BEST, _RESOLVED = "best.yaml", "config.yaml"
"""Of a sweep, and of a run."""


def replay_rates(document: Document) -> None:
    """Puts a run's rates in place of `from RUN`. Raises ConfigError where RUN has none that change."""
    path = ("outer", "lr_schedule")
    text = document.value(path)
    if not isinstance(text, str):
        return
    word, _, location = text.partition(" ")
    if word != "from" or not location.strip():
        raise ConfigError(
            f"outer.lr_schedule must be `from RUN` or a list of [step, rate], got {text!r}{document.place(path)}."
            " For example: from runs/sweeps/mine."
        )
    saved = _config_of(location.strip(), document)
    found = {(section, key): (saved.get(section) or {}).get(key) for section, key in RATES}
    if found["outer", "lr_schedule"] is None and found["algorithm", "inner_lr_schedule"] is None:
        raise ConfigError(
            f"outer.lr_schedule: {location.strip()} has no rates that change{document.place(path)}. Give a sweep of"
            " scheduler pbt or pb2, one of its trials, or a run with a schedule."
        )
    document.data["outer"]["lr_schedule"] = None
    for (section, key), value in found.items():
        if value is not None and isinstance(document.data.get(section), dict):
            document.data[section][key] = value


def _config_of(location: str, document: Document) -> dict[str, Any]:
    try:
        directory = RunDirectory(location)
        name = _BEST if directory.exists(_BEST) else _RESOLVED
        saved = read_plain_yaml(directory.read(name).decode(), f"{location}/{name}")
        if isinstance(saved, dict) and all(isinstance(saved.get(section), dict | None) for section, _ in RATES):
            return saved
        problem = f"{name} is no config"
    except (RunDirectoryError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        problem = first_line(error).partition(". ")[0]
    raise ConfigError(
        f"outer.lr_schedule: {location} is neither a run directory nor that of an ended sweep ({problem})"
        f"{document.place(('outer', 'lr_schedule'))}. Correct the path."
    )
