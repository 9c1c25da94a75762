"""Promise 1: the bits of a run do not depend on how many adapters there are, nor on what dies on the way."""

import dataclasses
import io
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from metadist import Callback, MetaTrainer, load_config
from metadist.config import Config
from metadist.core.plan import plan_evaluation, plan_step
from metadist.distributed.actors import AdapterActor
from metadist.distributed.kept_actors import end_kept_but
from metadist.distributed.ray_executor import RayExecutor
from metadist.distributed.start import make_executor
from metadist.errors import AdapterError, FingerprintError
from metadist.experiment import make_experiment
from metadist.sections import ScalingSettings
from metadist.tasks import Sinusoid
from metadist.tasks.class_pool import PoolRow, write_pool
from metadist.training import Result
from tests.distributed.faulty import KillsItsAdapter, Pauses, Raises, Sleeps, processes_named
from tests.poisoned import Poisoned

CONFIGS = Path(__file__).parents[2] / "configs"
OMNIGLOT = Path(__file__).parents[3] / "shared/data/omniglot"
pytestmark = pytest.mark.ray


def sinusoid(tmp_path: Path, steps: int = 12) -> Config:
    """The sinusoid config, short; 25 tasks in chunks of 4: seven chunks, the last with 3 filling tasks."""
    return load_config(
        CONFIGS / "sinusoid_maml.yaml",
        [
            f"training.steps={steps}",
            "training.chunk_size=4",
            "evaluation.episodes=20",
            f"run.storage_path={tmp_path}",
            "run.checkpoint_config.checkpoint_frequency=5",
            "run.log_every=1",
        ],
    )


def images(tmp_path: Path, policy: str = "transductive") -> Config:
    """The Omniglot config with few filters, over a small pool of random images."""
    pool = tmp_path / "pool.parquet"
    if not pool.exists():
        write_pool(_random_images(), pool)
    return load_config(
        CONFIGS / "omniglot_5w1s_maml.yaml",
        [
            f"task.pool={pool}",
            "model.filters=4",
            f"training.batch_norm={policy}",
            "training.steps=4",
            "training.meta_batch_size=10",
            "training.chunk_size=2",
            "training.compile=false",
            "evaluation.episodes=10",
            "evaluation.val_episodes=6",
            "evaluation.every=2",
            f"run.storage_path={tmp_path}",
        ],
    )


def _random_images() -> list[PoolRow]:
    random = np.random.default_rng(0)
    rows = []
    for split in ("train", "val", "test"):
        for number in range(6):
            for _ in range(3):
                file = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (16, 16), np.uint8)).save(file, "PNG")
                rows.append(PoolRow(f"{split}{number}", None, split, image=file.getvalue()))
    return rows


def fit(config: Config, workers: int, name: str, *callbacks: Callback) -> Result:
    return MetaTrainer(
        config,
        scaling_config=ScalingSettings(num_workers=workers),
        run_config=dataclasses.replace(config.run, name=name),
        callbacks=callbacks,
    ).fit()


class Faults(Callback):
    """Keeps what was lost, and when."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []

    def on_fault(self, step: int, fault: str, text: str) -> None:
        self.told.append((step, fault))


def bits(result: Result) -> tuple[object, ...]:
    """Everything of a run that must be equal: hashes, the last metrics, the evaluation, the metrics file."""
    metrics = (Path(result.run_dir) / "metrics.jsonl").read_text()
    assert result.evaluation is not None
    return result.theta_sha256, result.optimizer_sha256, str(result.train), str(result.evaluation.as_dict()), metrics


@pytest.mark.parametrize("make", [sinusoid, images], ids=["sinusoid", "images"])
def test_any_number_of_adapters_gives_the_bits_of_the_process_alone(local_ray: None, tmp_path: Path, make) -> None:
    config = make(tmp_path)
    alone = fit(config, 0, "alone")
    for workers in (1, 2, 3):
        assert bits(fit(config, workers, f"with_{workers}")) == bits(alone)


def test_with_a_lag_the_bits_are_the_same_for_any_number_of_adapters_and_after_a_resume(
    local_ray: None, tmp_path: Path
) -> None:
    config = images(tmp_path, "running")
    plain = fit(config, 0, "plain")
    config = dataclasses.replace(config, outer=dataclasses.replace(config.outer, lag=1))
    alone = fit(config, 0, "alone")
    assert alone.theta_sha256 != plain.theta_sha256
    for workers in (1, 2):
        assert bits(fit(config, workers, f"with_{workers}")) == bits(alone)
    # Stopped between two steps and begun anew, by another number of adapters.
    short = dataclasses.replace(config.training, steps=3)
    fit(dataclasses.replace(config, training=short), 2, "resumed")
    # All but metrics.jsonl, which has a line for each run's last step.
    assert bits(fit(config, 1, "resumed"))[:4] == bits(alone)[:4]


def test_running_batch_norm_statistics_have_the_same_bits_too(local_ray: None, tmp_path: Path) -> None:
    config = images(tmp_path, "running")
    assert bits(fit(config, 2, "with_2")) == bits(fit(config, 0, "alone"))


@pytest.mark.long
def test_omniglot_itself_has_the_same_bits(local_ray: None, tmp_path: Path) -> None:
    if not OMNIGLOT.exists():
        pytest.skip("the Omniglot archives are not beside this checkout")
    from click.testing import CliRunner

    from metadist.cli import cli

    pool = tmp_path / "omniglot.parquet"
    arguments = ["data", "import", "omniglot", "--source", str(OMNIGLOT), "--out", str(pool)]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    overrides = [f"task.pool={pool}", "training.steps=3", "evaluation.episodes=8", "evaluation.every=0"]
    overrides += ["training.compile=false", f"run.storage_path={tmp_path}"]
    config = load_config(CONFIGS / "omniglot_5w1s_maml.yaml", overrides)
    assert bits(fit(config, 2, "with_2")) == bits(fit(config, 0, "alone"))


def test_an_adapter_killed_in_mid_step_costs_its_own_chunks_and_no_bit(local_ray: None, tmp_path: Path) -> None:
    config = sinusoid(tmp_path)
    undisturbed = fit(config, 0, "undisturbed")
    source = KillsItsAdapter(step=6, marker=tmp_path / "killed")
    faults = Faults()
    disturbed = fit(dataclasses.replace(config, task=source), 2, "disturbed", faults)
    assert source.marker.exists()
    assert disturbed.adapters_lost == 1
    assert faults.told == [(7, "adapter_lost")]  # Told after the step in whose middle it happened, the seventh.
    # Seven chunks over two adapters: ranges of 4 and 3, of which the dead one held one.
    assert disturbed.chunks_recomputed in (3, 4)
    assert bits(disturbed)[:2] == bits(undisturbed)[:2]
    assert bits(disturbed)[4] == bits(undisturbed)[4]


def test_an_adapter_twenty_times_slower_and_one_that_hangs_cost_no_bit(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sinusoid(tmp_path, steps=40)
    undisturbed = fit(config, 0, "undisturbed")
    source, faults = Sleeps(step=4, directory=tmp_path), Faults()
    disturbed = MetaTrainer(
        dataclasses.replace(config, task=source),
        scaling_config=ScalingSettings(num_workers=3, hung_timeout_s=2.5),
        run_config=dataclasses.replace(config.run, name="disturbed"),
        callbacks=[faults],
    ).fit()
    hung = int((tmp_path / "hung").read_text())
    assert (tmp_path / "slow").read_text() != str(hung)
    # The one that hangs was ended and replaced; its range, and whatever the slow one was late with, went to others.
    assert [fault for _, fault in faults.told] == ["adapter_lost"]
    assert disturbed.adapters_lost == 1
    assert not Path(f"/proc/{hung}").exists()
    assert disturbed.chunks_given_twice >= 2
    assert "silent for" in capsys.readouterr().err
    assert bits(disturbed)[:2] == bits(undisturbed)[:2]
    assert bits(disturbed)[4] == bits(undisturbed)[4]


def test_an_adapter_is_not_ended_as_silent_where_the_driver_itself_was_held_up(local_ray: None, tmp_path: Path) -> None:
    class HeldUp(Callback):
        """The step's late ranges have been given to another adapter by then, and the driver does not look."""

        def on_step(self, step: int, metrics: dict[str, float], status: object) -> None:
            if step == 20:
                time.sleep(4)

    # Its pace is known by then: a call is late after half a second.
    source, faults = Pauses(step=19, seconds=2.0, marker=tmp_path / "one_paused"), Faults()
    result = MetaTrainer(
        dataclasses.replace(sinusoid(tmp_path, steps=30), task=source),
        scaling_config=ScalingSettings(num_workers=2, hung_timeout_s=2.5),
        callbacks=[HeldUp(), faults],
    ).fit()
    assert source.marker.exists()
    assert result.chunks_given_twice > 0
    assert (faults.told, result.adapters_lost) == ([], 0)


def test_an_adapter_that_computes_other_bits_is_refused_and_only_missed_where_it_is_needed(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(AdapterActor):
        def prepare(self, experiment: list[object]) -> tuple[dict[str, object], str]:
            fingerprint, node = super().prepare(experiment)
            return fingerprint | {"cpu_capability": "another processor"}, node

    config, told = sinusoid(tmp_path), []
    scaling = ScalingSettings(num_workers=(1, 2))
    experiment = make_experiment(config)

    def executor() -> RayExecutor:
        return RayExecutor(experiment, config.outer, 12, scaling, notify=told.append)

    running = executor()
    try:
        fingerprint = running.start(None, None, lambda: False)
        running._wait_for_adapters(2)
        monkeypatch.setattr("metadist.distributed.ray_executor.AdapterActor", Other)
        newcomer = running._new_slot()
        running._slots.append(newcomer)
        running._admit(newcomer)
        assert newcomer not in running._slots
        assert running.num_adapters == 2
        assert told[0].startswith("Refused: an adapter that Ray started computes other bits than this run did so far")
        assert "'another processor' here" in told[0]
    finally:
        running.close()
    end_kept_but(scaling, {})
    alone = executor()
    try:
        with pytest.raises(FingerprintError, match=r"computes other bits .* 'another processor' here"):
            alone.start(None, fingerprint, lambda: False)
    finally:
        alone.close()


def test_an_adapter_that_dies_with_the_next_step_already_in_hand_is_replaced_once(
    local_ray: None, tmp_path: Path
) -> None:
    import ray

    config = sinusoid(tmp_path)
    scaled = dataclasses.replace(config, scaling=ScalingSettings(num_workers=2))
    finals = []
    for disturb in (False, True):
        executor = make_executor(scaled, make_experiment(scaled), Console(quiet=True))
        assert isinstance(executor, RayExecutor)
        executor.start(None, None, lambda: False)
        for step in range(3):
            plan = plan_step(config.training.seed, step, config.training.meta_batch_size, 4)
            theta = executor.publish()
            executor.step(plan, theta, executor.run(plan, theta))
            if disturb and step == 1:
                # The learner has stepped, and step 2 is with both adapters; the evaluation meets the dead one first.
                ray.kill(executor._slots[0].actor)
                episodes = plan_evaluation(0, "val", 8, 4)
                executor.evaluate(episodes, executor.newest(), 1, ["transductive"])
        finals.append(executor.state())
        assert executor.counters.adapters_lost == (1 if disturb else 0)
        executor.close()
    np.testing.assert_array_equal(finals[1].theta, finals[0].theta)


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)], ids=["killed", "hung"]
)
def test_a_lost_learner_costs_the_steps_since_the_last_checkpoint_and_no_bit(
    local_ray: None, tmp_path: Path, how: signal.Signals
) -> None:
    config = sinusoid(tmp_path, steps=200)
    undisturbed = fit(config, 0, "undisturbed")
    hurt: list[int] = []

    def hurt_the_learner_once() -> None:
        metrics = tmp_path / "disturbed" / "checkpoints" / "step_00000010" / "manifest.json"
        while not metrics.exists():
            time.sleep(0.01)
        for pid in processes_named("ray::LearnerActor", os.getpid()):
            os.kill(pid, how)
            hurt.append(pid)

    hurting = threading.Thread(target=hurt_the_learner_once)
    hurting.start()
    faults = Faults()
    disturbed = MetaTrainer(
        config,
        scaling_config=ScalingSettings(num_workers=1, hung_timeout_s=2.0),
        run_config=dataclasses.replace(config.run, name="disturbed"),
        callbacks=[faults],
    ).fit()
    hurting.join()
    assert [fault for _, fault in faults.told] == ["learner_lost"]
    assert len(hurt) == 1
    assert bits(disturbed) == bits(undisturbed)


def test_an_error_of_the_users_source_stops_the_run_after_a_second_try_and_names_its_line(
    local_ray: None, tmp_path: Path
) -> None:
    config = dataclasses.replace(sinusoid(tmp_path), task=Raises(step=6))
    with pytest.raises(AdapterError) as caught:
        fit(config, 2, "raises")
    message = str(caught.value)
    for part in ("step 6, chunk", "Raises raised ZeroDivisionError: no such sinusoid", "faulty.py, line"):
        assert part in message
    # What was saved before is there: the run goes on from it when the source is mended.
    assert (tmp_path / "raises/checkpoints/step_00000005/manifest.json").exists()


def test_bad_episodes_are_left_out_alike_for_any_number_of_adapters(local_ray: None, tmp_path: Path) -> None:
    bad = {(2, 3): "huge", (2, 9): "raises", (2, 24): "nan", (7, 0): "raises"}
    config = dataclasses.replace(sinusoid(tmp_path), task=Poisoned(bad, Sinusoid(shots=10, queries=10)))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, on_bad_episode="skip"))
    found = {}
    for workers in (0, 3):
        result = fit(config, workers, f"with_{workers}")
        found[workers] = (*bits(result), (Path(result.run_dir) / "bad_episodes.jsonl").read_text())
    assert len(found[0][-1].splitlines()) == len(bad)
    assert found[3] == found[0]


def test_adapters_that_the_cluster_has_no_room_for_yet_do_not_keep_the_others_waiting(
    local_ray: None, tmp_path: Path
) -> None:
    config = sinusoid(tmp_path)
    # Four CPUs: at most four of six adapters start, and two are enough.
    elastic = MetaTrainer(
        config,
        scaling_config=ScalingSettings(num_workers=(2, 6)),
        run_config=dataclasses.replace(config.run, name="elastic"),
    ).fit()
    assert bits(elastic) == bits(fit(config, 0, "alone"))
