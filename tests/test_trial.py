"""A trial that is begun again tells the same, and computes only what its checkpoints do not have."""

import contextlib
import dataclasses
from pathlib import Path

import pytest

from metadist.config import Config
from metadist.core.outer import OuterSettings
from metadist.run_directory import RunDirectory
from metadist.sections import CheckpointSettings, EvaluationSettings, RunSettings
from metadist.sweeps.trial import FAILURE_FILE, OUTCOME_FILE, Report, TrialFailedError, run_trial
from tests.builders import tiny_config


class Killed(Exception):
    """Stands for a process that ends while a scheduler is told."""


def config_in(folder: Path) -> Config:
    config = tiny_config(
        evaluation=EvaluationSettings(every=1, val_episodes=5),
        run=RunSettings(
            name="trial",
            storage_path=str(folder),
            checkpoint_config=CheckpointSettings(checkpoint_frequency=2),
        ),
    )
    return dataclasses.replace(config, training=dataclasses.replace(config.training, steps=5))


def told_by(config: Config, until: int | None = None) -> list[Report]:
    told: list[Report] = []

    def tell(report: Report) -> None:
        told.append(report)
        if report["step"] == until:
            raise Killed

    with contextlib.suppress(Killed):
        run_trial(config, tell)
    return told


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4])
def test_a_trial_killed_at_any_step_tells_the_same_when_it_is_begun_again(tmp_path: Path, killed_at: int) -> None:
    undisturbed = told_by(config_in(tmp_path / "undisturbed"))
    assert [report["step"] for report in undisturbed] == [1, 2, 3, 4, 5]
    assert len({report["loss"] for report in undisturbed}) == 5
    config = config_in(tmp_path / "killed")
    assert told_by(config, until=killed_at) == undisturbed[:killed_at]
    assert told_by(config) == undisturbed


def test_an_ended_trial_tells_what_it_told_and_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path)
    before = told_by(config, until=3)
    RunDirectory(config.run_directory).write_json(OUTCOME_FILE, {"outcome": "stopped"})
    monkeypatch.setattr("metadist.sweeps.trial.MetaTrainer", None)
    assert told_by(config) == before


def test_a_trial_that_diverges_is_marked_and_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config_in(tmp_path), outer=OuterSettings(optimizer="sgd", lr=1e30))
    with pytest.raises(TrialFailedError, match="NonFiniteError"):
        run_trial(config, lambda report: None)
    assert (Path(config.run_directory) / FAILURE_FILE).exists()
    monkeypatch.setattr("metadist.sweeps.trial.MetaTrainer", None)
    with pytest.raises(TrialFailedError, match="NonFiniteError"):
        run_trial(config, lambda report: None)
