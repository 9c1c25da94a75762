"""The second backend: ranks under Ray Train that reduce among themselves. Groups start slowly, so there are three."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from metadist import MetaTrainer, ScalingSettings
from metadist.bad_episodes import read_bad_episodes
from metadist.config import Config
from metadist.core.meta_gradient import EpisodeScores
from metadist.core.plan import plan_evaluation, plan_step
from metadist.distributed.fingerprint import refuse_other
from metadist.distributed.start import make_executor
from metadist.errors import AdapterError, FingerprintError
from metadist.experiment import make_experiment
from metadist.tasks import Sinusoid
from metadist.training import Result
from tests.distributed.faulty import KillsItsAdapter, Raises
from tests.distributed.test_same_bits import bits, images, sinusoid
from tests.poisoned import Poisoned

pytestmark = [pytest.mark.ray, pytest.mark.head]

ALONE = ScalingSettings(num_workers=0)
RANKS = ScalingSettings(num_workers=2, backend="train")
FAST = dataclasses.replace(RANKS, reduce="fast")


def fit(config: Config, scaling: ScalingSettings, name: str, steps: int | None = None) -> Result:
    training = dataclasses.replace(config.training, steps=steps or config.training.steps)
    config = dataclasses.replace(config, training=training, run=dataclasses.replace(config.run, name=name))
    return MetaTrainer(config, scaling_config=scaling).fit()


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Two steps on a source that raises in the third, and an evaluation after it."""

    fingerprint: dict[str, Any]
    theta: np.ndarray
    metrics: dict[str, float]
    error: AdapterError
    scores: EpisodeScores


def two_steps_and_an_error(config: Config, scaling: ScalingSettings) -> Evidence:
    scaled = dataclasses.replace(config, scaling=scaling, task=Raises(step=2))
    executor = make_executor(scaled, make_experiment(scaled), Console(quiet=True))

    def step(number: int) -> dict[str, float]:
        plan, theta = plan_step(0, number, 25, 5), executor.publish()
        return executor.step(plan, theta, executor.run(plan, theta))

    try:
        fingerprint = executor.start(None, None, lambda: False)
        step(0)
        metrics = step(1)
        with pytest.raises(AdapterError) as caught:
            step(2)
        scores = executor.evaluate(plan_evaluation(0, "val", 9, 5), executor.newest(), 1, ["transductive"])
        state = executor.state()
        assert state.step == 2
        return Evidence(fingerprint, state.theta, metrics, caught.value, scores)
    finally:
        executor.close()


@pytest.fixture(scope="module")
def exact_and_fast(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evidence, Evidence]:
    """The in-process executor's evidence, and that of two ranks with a fast reduction."""
    # Five chunks over two ranks are the ranges 0-1, 2-3 and 4: the tree adds (a + b) + c, the ranks (a + c) + b.
    config = sinusoid(tmp_path_factory.mktemp("evidence"))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, chunk_size=5))
    return two_steps_and_an_error(config, ALONE), two_steps_and_an_error(config, FAST)


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


@pytest.mark.long
def test_a_fast_reduction_adds_in_another_order_and_agrees(exact_and_fast: tuple[Evidence, Evidence]) -> None:
    exact, fast = exact_and_fast
    assert not np.array_equal(fast.theta, exact.theta)
    np.testing.assert_allclose(fast.theta, exact.theta, rtol=1e-5, atol=1e-5)
    for name, value in exact.metrics.items():
        assert fast.metrics[name] == pytest.approx(value, rel=1e-5, nan_ok=True)


@pytest.mark.long
def test_a_run_does_not_go_from_a_fast_reduction_to_an_exact_one_unsaid(
    exact_and_fast: tuple[Evidence, Evidence],
) -> None:
    exact, fast = exact_and_fast
    assert fast.fingerprint == exact.fingerprint | {"reduce": "fast"}
    with pytest.raises(FingerprintError, match="reduce 'fast' there, None here"):
        refuse_other(exact.fingerprint, fast.fingerprint, "this process")


@pytest.mark.long
def test_an_error_of_the_users_source_comes_from_its_rank_and_leaves_the_group_in_step(
    exact_and_fast: tuple[Evidence, Evidence],
) -> None:
    exact, fast = exact_and_fast
    for part in ("step 2, chunk 0", "Raises raised ZeroDivisionError: no such sinusoid", "faulty.py, line"):
        assert part in str(fast.error)
    np.testing.assert_allclose(fast.scores.loss, exact.scores.loss, rtol=1e-4)


@pytest.mark.long
def test_a_killed_rank_restarts_the_group_from_the_last_checkpoint_and_costs_no_bit(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sinusoid(tmp_path)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, on_bad_episode="skip"))
    bad = Poisoned({(6, 3): "huge", (6, 9): "raises", (9, 24): "nan"}, Sinusoid())
    undisturbed = fit(dataclasses.replace(config, task=bad), ALONE, "undisturbed")
    source = KillsItsAdapter(step=7, marker=tmp_path / "killed", source=bad)
    disturbed = fit(dataclasses.replace(config, task=source), RANKS, "disturbed")
    assert source.marker.exists()
    # Step 6 was made twice, and its bad episodes are told once.
    recorded = [read_bad_episodes(tmp_path / name) for name in ("undisturbed", "disturbed")]
    assert [[(line["step"], line["task"]) for line in lines] for lines in recorded] == [
        [(step, f"train/seed=0/step={step}/task={task}") for step, task in bad.bad]
    ] * 2
    assert disturbed.adapters_lost == 1
    # Steps 5 and 6 had been made since the checkpoint, of seven chunks each.
    assert disturbed.chunks_recomputed == 14
    assert bits(disturbed)[:2] == bits(undisturbed)[:2]
    assert bits(disturbed)[4] == bits(undisturbed)[4]
    assert "died: " in capsys.readouterr().err
