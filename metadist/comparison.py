"""Comparing: each run or config is trained where it is not yet, and all are evaluated on the very same episodes."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from metadist.checkpoint import Checkpoints
from metadist.config import OWN_OBJECT, Config, config_to_dict, load_config
from metadist.core.keys import TaskKey
from metadist.core.task_source import TaskSource
from metadist.distributed.connection import one_connection
from metadist.errors import UserError
from metadist.evaluation import asked_of, experiment_to_score, load_run_config, load_state, score_state
from metadist.experiment import check_splits
from metadist.paired import ComparedRun, Comparison
from metadist.resume import open_run
from metadist.run_directory import RunDirectory
from metadist.scores import Evaluation
from metadist.sections import EvaluationSettings
from metadist.training import MetaTrainer

EPISODES_AT_ONCE = 16
"""Episodes held in memory while it is seen whether two sources give the same ones."""


def compare(
    items: Sequence[str | Path | Config],
    *,
    overrides: Sequence[str] = (),
    split: str | None = None,
    episodes: int | None = None,
    seed: int | None = None,
    num_workers: int | tuple[int, int] | None = None,
    address: str | None = None,
    console: Console | None = None,
) -> Comparison:
    """Evaluates run directories and configs on the same episodes, and holds them against the first.

    A config is trained into its run directory, gone on with, or taken as it is where it is finished;
    `overrides` (`section.key=value`) apply to config files. What is left out of split, episodes and seed is as
    the first one's config has it; inner steps at test are each one's own. Nothing is trained where the input
    is wrong or the episodes differ: UserError.
    """
    console = console or Console(stderr=True)
    if not items:
        raise UserError("compare needs configs or run directories, got none. Give two or more.")
    entries = [_open(item, overrides) for item in items]
    if overrides and not any(entry.is_file for entry in entries):
        raise UserError("--set applies to config files, and none is given: run directories are taken as they are.")
    first = asked_of(entries[0].config, split, episodes, seed, None, None).evaluation
    entries = [
        dataclasses.replace(entry, config=asked_of(entry.config, None, None, None, num_workers, address))
        for entry in entries
    ]
    _refuse_one_directory_for_two(entries)
    unfinished = _check(entries, first, console)
    runs = []
    with one_connection([entry.config.scaling for entry in entries], console):
        for name, entry, is_unfinished in zip(_names(entries), entries, unfinished, strict=True):
            if is_unfinished:
                console.print(Text(f"Training {entry.given} into {entry.run_dir}"))
                MetaTrainer(entry.config, console=console).fit(evaluate=False)
            console.print(Text(f"Evaluating {entry.run_dir}"))
            runs.append(ComparedRun(name, entry.run_dir, entry.algorithm, _evaluate(entry.scored_as(first), console)))
    return Comparison(runs)


@dataclass(frozen=True)
class _Entry:
    """One thing to compare."""

    given: str
    """As it was asked for."""
    config: Config
    run_dir: str
    to_train: bool
    """False for run directories, which are taken as they are."""
    is_file: bool = False

    @property
    def algorithm(self) -> str:
        named = config_to_dict(self.config)["algorithm"]
        return str(named["class"] if named["name"] == OWN_OBJECT else named["name"])

    def scored_as(self, first: EvaluationSettings) -> "_Entry":
        """With the split, number and seed of episodes that all have in common."""
        config = asked_of(self.config, first.split, first.episodes, first.seed, None, None)
        return dataclasses.replace(self, config=config)


def _open(item: str | Path | Config, overrides: Sequence[str]) -> _Entry:
    if isinstance(item, Config):
        return _Entry(item.run.name or "a config", item, item.run_directory, to_train=True)
    given = str(item)
    if "://" in given or os.path.isdir(os.path.expanduser(given)):
        with closing(RunDirectory(given)) as directory:
            return _Entry(given, load_run_config(directory), given, to_train=False)
    if not os.path.exists(given):
        raise UserError(
            f"{given}: there is neither a config file nor a run directory. Give the path of a YAML file, or the"
            " directory that `metadist train` printed."
        )
    config = load_config(given, overrides)
    return _Entry(given, config, config.run_directory, to_train=True, is_file=True)


def _refuse_one_directory_for_two(entries: list[_Entry]) -> None:
    trained: dict[str, _Entry] = {}
    for entry in entries:
        if entry.to_train:
            other = trained.setdefault(entry.run_dir, entry)
            if config_to_dict(other.config) != config_to_dict(entry.config):
                raise UserError(
                    f"{other.given} and {entry.given} would both be trained into {entry.run_dir}."
                    " Give each a run.name of its own."
                )


def _check(entries: list[_Entry], first: EvaluationSettings, console: Console) -> list[bool]:
    """Whether each is still to be trained. Raises UserError where something is wrong with one of them."""
    unfinished, digests = [], []
    for entry in entries:
        experiment = experiment_to_score(entry.scored_as(first).config)
        with closing(RunDirectory(entry.run_dir)) as directory:
            if entry.to_train:
                config = entry.config
                used = ["train", *(["val"] if config.evaluation.every else [])]
                check_splits(experiment.source, config.training.seed, used)
                step = None
                if Checkpoints(directory, experiment.theta, experiment.network.statistics_layout).steps():
                    state, _ = open_run(directory, config, experiment, "must", True, Console(quiet=True))
                    step = state.step if state else None
                unfinished.append(step != config.training.steps)
            else:
                load_state(directory, experiment, None, console)
                unfinished.append(False)
        digests.append(_digest(experiment.source, first))
        if digests[-1] != digests[0]:
            _refuse_other_episodes(entries[0], entry)
    return unfinished


def _digest(source: TaskSource, settings: EvaluationSettings) -> str:
    """SHA-256 of all episodes: whether two evaluations can be paired does not hang on what settings are called."""
    digest = hashlib.sha256()
    for start in range(0, settings.episodes, EPISODES_AT_ONCE):
        tasks = range(start, min(start + EPISODES_AT_ONCE, settings.episodes))
        batch = source.sample([TaskKey(settings.seed, settings.split, 0, task) for task in tasks])
        for tensor in (*batch.support, *batch.query):
            digest.update(repr(tuple(tensor.shape)).encode() + np.ascontiguousarray(tensor.numpy()).data)
    return digest.hexdigest()


def _refuse_other_episodes(first: _Entry, other: _Entry) -> None:
    there, here = (config_to_dict(entry.config)["task"] for entry in (first, other))
    different = [
        f"task.{key}: {there[key]!r} there, {here[key]!r} here"
        for key in there
        if key in here and there[key] != here[key] and not key.startswith("train_")
    ]
    raise UserError(
        f"{other.given} has other episodes than {first.given}, and only scores on the same ones can be compared:"
        f" {'; '.join(different) or 'their settings are equal, their data are not'}."
        " Make them equal, or evaluate each by itself."
    )


def _names(entries: list[_Entry]) -> list[str]:
    """The run directories' last parts, or all of their paths where those would not tell them apart."""
    paths = [entry.run_dir.rstrip("/") for entry in entries]
    last = [path.rpartition("/")[2] for path in paths]
    return last if len(set(last)) == len(set(paths)) else paths


def _evaluate(entry: _Entry, console: Console) -> Evaluation:
    experiment = experiment_to_score(entry.config)
    with closing(RunDirectory(entry.run_dir)) as directory:
        state = load_state(directory, experiment, None, console)
    return score_state(entry.config, experiment, state, console, own_policy_alone=True)
