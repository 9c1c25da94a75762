"""The second backend: ranks under Ray Train that reduce among themselves. Each test starts one group of them."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from metadist import MetaTrainer, ScalingSettings
from metadist.config import Config
from metadist.core.plan import plan_evaluation, plan_step
from metadist.distributed.start import make_executor
from metadist.errors import AdapterError, FingerprintError
from metadist.experiment import make_experiment
from metadist.run_directory import RunDirectory
from metadist.training import Result
from tests.distributed.faulty import KillsItsAdapter, Raises
from tests.distributed.test_same_bits import bits, images, sinusoid

pytestmark = pytest.mark.ray

ALONE = ScalingSettings(num_workers=0)
RANKS = ScalingSettings(num_workers=2, backend="train")
FAST = dataclasses.replace(RANKS, reduce="fast")


def fit(config: Config, scaling: ScalingSettings, name: str, steps: int | None = None) -> Result:
    training = dataclasses.replace(config.training, steps=steps or config.training.steps)
    config = dataclasses.replace(config, training=training, run=dataclasses.replace(config.run, name=name))
    return MetaTrainer(config, scaling_config=scaling).fit()


def theta_of(result: Result, config: Config) -> np.ndarray:
    from metadist.evaluation import load_state

    return load_state(RunDirectory(result.run_dir), make_experiment(config), None, Console(quiet=True)).theta


def test_a_run_that_goes_from_backend_to_backend_has_the_bits_of_one_process(local_ray: None, tmp_path: Path) -> None:
    # Conv-4 with running statistics, five chunks over two ranks, a validation in every part.
    config = images(tmp_path, "running")
    training = dataclasses.replace(config.training, steps=9)
    config = dataclasses.replace(config, training=training, evaluation=dataclasses.replace(config.evaluation, every=3))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, log_every=1))
    alone = fit(config, ALONE, "alone")
    fit(config, ScalingSettings(num_workers=1), "mixed", steps=3)
    in_between = fit(config, dataclasses.replace(RANKS, shard_optimizer=True), "mixed", steps=6)
    assert in_between.step == 6
    assert bits(fit(config, ALONE, "mixed")) == bits(alone)


def test_a_fast_reduction_adds_in_another_order_and_says_so(local_ray: None, tmp_path: Path) -> None:
    # Five chunks over two ranks are the ranges 0-1, 2-3 and 4: the tree adds (a + b) + c, the ranks (a + c) + b.
    config = sinusoid(tmp_path)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, chunk_size=5))
    exact, fast = fit(config, ALONE, "exact"), fit(config, FAST, "fast")
    assert fast.theta_sha256 != exact.theta_sha256
    np.testing.assert_allclose(theta_of(fast, config), theta_of(exact, config), rtol=1e-5, atol=1e-5)
    assert fast.train["loss"] == pytest.approx(exact.train["loss"], rel=1e-5)
    with pytest.raises(FingerprintError, match="reduce 'fast' there, None here"):
        fit(config, ALONE, "fast", steps=config.training.steps + 1)


def test_a_killed_rank_restarts_the_group_from_the_last_checkpoint_and_costs_no_bit(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sinusoid(tmp_path)
    undisturbed = fit(config, ALONE, "undisturbed")
    source = KillsItsAdapter(step=7, marker=tmp_path / "killed")
    disturbed = fit(dataclasses.replace(config, task=source), RANKS, "disturbed")
    assert source.marker.exists()
    assert disturbed.adapters_lost == 1
    # Steps 5 and 6 had been made since the checkpoint, of seven chunks each.
    assert disturbed.chunks_recomputed == 14
    assert bits(disturbed)[:2] == bits(undisturbed)[:2]
    assert bits(disturbed)[4] == bits(undisturbed)[4]
    assert "died: " in capsys.readouterr().err


def test_an_error_of_the_users_source_comes_from_its_rank_and_leaves_the_group_in_step(
    local_ray: None, tmp_path: Path
) -> None:
    config = dataclasses.replace(sinusoid(tmp_path), task=Raises(step=2))
    scores = []
    for scaling in (ALONE, RANKS):
        scaled = dataclasses.replace(config, scaling=scaling)
        executor = make_executor(scaled, make_experiment(scaled), Console(quiet=True))
        executor.start(None, None, lambda: False)
        try:
            for step in range(3):
                plan, theta = plan_step(0, step, 25, 4), executor.publish()
                if step < 2:
                    executor.step(plan, theta, executor.run(plan, theta))
                    continue
                with pytest.raises(AdapterError, match=r"step 2, chunk .*Raises raised ZeroDivisionError.*faulty.py"):
                    executor.step(plan, theta, executor.run(plan, theta))
            scores.append(executor.evaluate(plan_evaluation(0, "val", 9, 4), executor.publish(), 1, ["transductive"]))
            assert executor.state().step == 2
        finally:
            executor.close()
    np.testing.assert_array_equal(scores[1].loss, scores[0].loss)
    assert math.isfinite(float(scores[1].loss.sum()))
