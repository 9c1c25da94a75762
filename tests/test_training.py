"""The training loop beside an executor that loses its learner."""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from metadist import MetaTrainer
from metadist.algorithms import MAML
from metadist.distributed.in_process import InProcessExecutor
from metadist.errors import LearnerLostError
from metadist.experiment import make_experiment
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


def test_runs_one_after_another_in_a_process_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives up on a function of which it has compiled too many versions, and computes it with other bits."""
    # The quickest compiler: what is counted is how often it is called.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    limits = torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True)
    with limits, contextlib.closing(tiny_executor(0.05)) as first, contextlib.closing(tiny_executor(0.07)) as second:
        one, other = first.start(None, None, lambda: False), second.start(None, None, lambda: False)
    assert one["canonical_gradient"] != other["canonical_gradient"]


def tiny_executor(inner_lr: float) -> InProcessExecutor:
    config = tiny_config(algorithm=MAML(inner_lr=inner_lr, inner_steps=1))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, compile=True))
    return InProcessExecutor(make_experiment(config), config.outer, config.training.steps)
