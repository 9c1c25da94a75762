"""The training loop beside an executor that loses its learner."""

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from metadist import MetaTrainer
from metadist.distributed.in_process import InProcessExecutor
from metadist.errors import LearnerLostError
from metadist.sections import CheckpointSettings, FailureSettings, RunSettings
from tests.builders import tiny_config


def config_in(directory: Path, max_failures: int):
    run = RunSettings(
        name="run",
        storage_path=str(directory),
        log_every=1,
        checkpoint_config=CheckpointSettings(checkpoint_frequency=2),
        failure_config=FailureSettings(max_failures=max_failures),
    )
    return dataclasses.replace(tiny_config(), run=run)


def losing(replacements: int):
    """An executor whose learner is lost in step 3, and so are as many of those that take its place."""

    class Losing(InProcessExecutor):
        left = replacements
        was_lost = False

        def step(self, plan, theta, sums):
            if plan.step == 3 and not self.was_lost:
                Losing.was_lost = True
                raise LearnerLostError("the learner was lost")
            return super().step(plan, theta, sums)

        def replace_learner(self, state):
            if self.was_lost and self.left:
                Losing.left -= 1
                raise LearnerLostError("the learner was lost while it was replaced")
            super().replace_learner(state)

    return Losing


@pytest.mark.parametrize(("replacements", "max_failures"), [(0, 1), (2, 3), (2, -1)])
def test_a_learner_that_is_lost_while_it_is_replaced_is_replaced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacements: int, max_failures: int
) -> None:
    undisturbed = MetaTrainer(config_in(tmp_path / "undisturbed", 0)).fit(evaluate=False)
    executor = losing(replacements)
    monkeypatch.setattr(
        "metadist.training.make_executor", lambda config, experiment, console: executor(experiment, config.outer, 6)
    )
    result = MetaTrainer(config_in(tmp_path / "disturbed", max_failures)).fit(evaluate=False)
    assert executor.left == 0
    assert (result.theta_sha256, result.optimizer_sha256) == (undisturbed.theta_sha256, undisturbed.optimizer_sha256)
    metrics = [(tmp_path / name / "run/metrics.jsonl").read_text() for name in ("undisturbed", "disturbed")]
    assert metrics[0] == metrics[1]


def test_more_losses_than_are_allowed_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = losing(2)
    monkeypatch.setattr(
        "metadist.training.make_executor", lambda config, experiment, console: executor(experiment, config.outer, 6)
    )
    with pytest.raises(LearnerLostError):
        MetaTrainer(config_in(tmp_path, 2), console=Console(quiet=True)).fit(evaluate=False)
