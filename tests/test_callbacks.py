"""What callbacks are told, and the time line of a run."""

import dataclasses
from pathlib import Path

import pytest

from metadist import Callback, MetaTrainer
from metadist.config import Config
from metadist.distributed.seconds import Seconds
from metadist.sections import CheckpointSettings, EvaluationSettings, RunSettings
from metadist.timeline import TimeLine, read_timeline
from tests.builders import tiny_config

STEPS = 6


class Records(Callback):
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.told: list[tuple] = []
        self.statuses: list = []

    def on_start(self, config, run_dir, step):
        self.told.append(("start", run_dir, step))

    def on_step(self, step, metrics, status):
        self.told.append(("step", step, metrics["loss"]))
        self.statuses.append(status)

    def on_evaluation(self, step, split, scores):
        self.told.append(("evaluation", step, split, scores["loss"]))

    def on_checkpoint(self, step):
        self.told.append(("checkpoint", step))

    def on_fault(self, step, fault, text):
        self.told.append(("fault", step, fault))

    def on_end(self, step):
        self.told.append(("end", step))


def config_in(directory: Path, **changes) -> Config:
    run = RunSettings(
        name="run",
        storage_path=str(directory),
        log_every=2,
        checkpoint_config=CheckpointSettings(checkpoint_frequency=4),
    )
    evaluation = EvaluationSettings(episodes=4, every=3, val_episodes=4)
    return tiny_config(run=run, evaluation=evaluation, **changes)


def test_a_callback_is_told_everything_in_order(tmp_path):
    records = Records()
    result = MetaTrainer(config_in(tmp_path), callbacks=[records]).fit()
    told = [entry[:3] if entry[0] == "evaluation" else entry[:2] for entry in records.told]
    assert told == [
        ("start", result.run_dir),
        *[("step", step) for step in (1, 2, 3)],
        ("evaluation", 3, "val"),
        ("step", 4),
        ("checkpoint", 4),
        ("step", 5),
        ("step", 6),
        ("evaluation", 6, "val"),
        ("checkpoint", 6),
        ("evaluation", 6, "test"),
        ("end", 6),
    ]
    losses = {entry[1]: entry[2] for entry in records.told if entry[0] == "step"}
    assert losses[STEPS] == result.train["loss"]
    assert records.told[-2][3] == result.evaluation.as_dict()["loss"]["mean"]
    for status in records.statuses:
        assert status.num_adapters == 1
        assert status.seconds.sampling > 0 < status.seconds.adapting
        assert status.seconds.reducing > 0 < status.seconds.stepping


def test_a_resumed_run_starts_where_it_stood_and_an_error_of_a_callback_ends_the_run(tmp_path):
    class Breaks(Records):
        def on_step(self, step, metrics, status):
            super().on_step(step, metrics, status)
            if step == 5:
                raise RuntimeError("no space in the tracker")

    broken = Breaks()
    with pytest.raises(RuntimeError, match="no space in the tracker"):
        MetaTrainer(config_in(tmp_path), callbacks=[broken]).fit()
    assert broken.told[-1] == ("end", 5)
    records = Records()
    MetaTrainer(config_in(tmp_path), callbacks=[records]).fit()
    assert records.told[0][2] == 4
    assert records.told[1][:2] == ("step", 5)


@pytest.mark.pictures
def test_the_time_line_adds_up_and_has_a_picture(tmp_path):
    result = MetaTrainer(config_in(tmp_path)).fit()
    lines = read_timeline(Path(result.run_dir))
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        parts = sum(line[name] for name in (*Seconds._fields, "waiting"))
        assert line["wall"] == pytest.approx(parts)
        assert line["adapting"] > 0
    assert (Path(result.run_dir) / "timeline.png").stat().st_size > 5000


def test_a_line_is_the_mean_of_its_steps_and_forgets_what_is_done_again(tmp_path, monkeypatch):
    clock = iter([10.0, 11.0, 14.0, 20.0, 20.5])  # A step of 1 s, one of 3 s; a pause; a step of half a second.
    monkeypatch.setattr("metadist.timeline.time.perf_counter", lambda: next(clock))
    line = TimeLine(tmp_path, first_step=0, log_every=2)
    assert line.step(1, Seconds(sampling=0.25, adapting=0.5), last=False) is None
    means = line.step(2, Seconds(sampling=0.75, adapting=1.5), last=False)
    assert means == {"wall": 2.0, "sampling": 0.5, "adapting": 1.0, "reducing": 0, "stepping": 0, "waiting": 0.5}
    line.restart()
    assert line.step(3, Seconds(), last=True)["wall"] == 0.5
    line.close()
    assert [entry["step"] for entry in read_timeline(tmp_path)] == [2, 3]
    monkeypatch.undo()
    TimeLine(tmp_path, first_step=2, log_every=2).close()
    assert [entry["step"] for entry in read_timeline(tmp_path)] == [2]


def test_callbacks_change_no_bit(tmp_path):
    plain = MetaTrainer(config_in(tmp_path / "plain")).fit()
    watched = MetaTrainer(config_in(tmp_path / "watched"), callbacks=[Records()]).fit()
    assert dataclasses.astuple(plain)[1:4] == dataclasses.astuple(watched)[1:4]
