"""Accuracy against the number of shots: one run, evaluated with support sets of several sizes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from metadist.config import Config
from metadist.distributed.connection import one_connection
from metadist.errors import UserError
from metadist.evaluation import asked_of, experiment_to_score, load_run_config, load_state, score_state
from metadist.pictures import draw_against_shots
from metadist.run_directory import RunDirectory
from metadist.scores import HEADERS, Evaluation, add_column, nan_to_none, written


@dataclass(frozen=True)
class ShotsEvaluation:
    """Evaluations of one checkpoint by the number of shots, in ascending order."""

    by_shots: dict[int, Evaluation]

    @property
    def first(self) -> Evaluation:
        return next(iter(self.by_shots.values()))

    @property
    def score(self) -> str:
        return self.first.scores[-1]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as evaluation_shots.json has them: scores after the last inner step."""
        first = self.first
        result = {
            "split": first.split,
            "episodes": first.episodes,
            "seed": first.seed,
            "step": first.step,
            "batch_norm": first.policies[0].batch_norm,
            "inner_steps": first.inner_steps,
            "shots": [
                {
                    "shots": shots,
                    "policies": [
                        {
                            "batch_norm": policy.batch_norm,
                            "loss": policy.loss[-1],
                            "accuracy": policy.accuracy[-1] if evaluation.is_classification else None,
                            "ece": policy.calibration[-1].ece if policy.calibration else None,
                        }
                        for policy in evaluation.policies
                    ],
                }
                for shots, evaluation in self.by_shots.items()
            ],
        }
        plain: dict[str, Any] = nan_to_none(result)
        return plain

    def table(self) -> Table:
        """One row a number of shots, one column a policy."""
        first = self.first
        title = (
            f"{first.episodes} {first.split} episodes, theta of step {first.step}, after {first.inner_steps} inner"
            f" step{'' if first.inner_steps == 1 else 's'}; mean and 95 % interval"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("shots", justify="right")
        columns = []
        for index, policy in enumerate(first.policies):
            policies = [evaluation.policies[index] for evaluation in self.by_shots.values()]
            columns.append([written(getattr(policy, self.score)[-1], self.score) for policy in policies])
            add_column(table, HEADERS[self.score] + policy.condition, columns[-1])
        for shots, *cells in zip(self.by_shots, *columns, strict=True):
            table.add_row(str(shots), *cells)
        return table


def evaluate_shots(
    run_dir: str,
    shots: Sequence[int],
    *,
    split: str | None = None,
    episodes: int | None = None,
    seed: int | None = None,
    step: int | None = None,
    num_workers: int | tuple[int, int] | None = None,
    address: str | None = None,
    config: Config | None = None,
    console: Console | None = None,
) -> ShotsEvaluation:
    """Evaluates a checkpoint with support sets of each size, and writes evaluation_shots.json and a picture.

    Sizes are given as examples a class, or points in regression; everything else is as in `evaluate`.
    """
    if not shots or min(shots) < 1:
        raise UserError(f"shots must be numbers of at least 1, got {list(shots)}. For example: 1, 5, 10.")
    console = console or Console(stderr=True)
    directory = RunDirectory(run_dir)
    try:
        config = asked_of(config or load_run_config(directory), split, episodes, seed, num_workers, address)
        # The largest first: where a class is too small for it, that is found before anything is computed.
        configs = {number: _with_shots(config, number) for number in sorted(set(shots), reverse=True)}
        experiment = experiment_to_score(configs[max(configs)])
        state = load_state(directory, experiment, step, console)
        found = {}
        with one_connection([config.scaling], console):
            for number, changed in configs.items():
                if number != max(configs):
                    experiment = experiment_to_score(changed)
                found[number] = score_state(changed, experiment, state, console)
        evaluation = ShotsEvaluation(dict(sorted(found.items())))
        directory.write_json("evaluation_shots.json", evaluation.as_dict())
        draw_against_shots(evaluation.by_shots, directory.local)
        directory.upload()
        return evaluation
    finally:
        directory.close()


def _with_shots(config: Config, shots: int) -> Config:
    task, split = config.task, config.evaluation.split
    if not dataclasses.is_dataclass(task) or "shots" not in {field.name for field in dataclasses.fields(task)}:
        raise UserError(
            f"--shots: task {type(task).__name__} has no setting `shots` that could be changed. Evaluate without it."
        )
    train_shots = getattr(task, "train_shots", None)
    if split == "train" and train_shots is not None:
        raise UserError(
            f"--shots changes task.shots, and episodes of split 'train' have task.train_shots = {train_shots} instead."
            " Use --split val or test."
        )
    return dataclasses.replace(config, task=dataclasses.replace(task, shots=shots))  # type: ignore[type-var]
