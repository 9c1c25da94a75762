"""What a run leaves beside its checkpoints: metrics.jsonl and TensorBoard events."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metadist.tracking import METRICS_FILE, Tracker, read_metrics


def track(directory: Path, first_step: int, losses: dict[int, float], log_every: int = 1) -> None:
    """A run that goes on after `first_step`, with these losses by step."""
    tracker = Tracker(directory, first_step, log_every)
    for step, loss in losses.items():
        tracker.step(step, {"loss": loss, "accuracy": math.nan}, 10.0, last=False)
    tracker.close()


def losses_in_tensorboard(directory: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def test_steps_that_a_resume_makes_again_are_there_once(tmp_path: Path) -> None:
    track(tmp_path, 0, {1: 0.5, 2: 0.25, 3: 8.0, 4: 16.0})
    # Killed after step 4, with a checkpoint of step 2.
    track(tmp_path, 2, {3: 0.125, 4: 0.0625})
    expected = [(1, 0.5), (2, 0.25), (3, 0.125), (4, 0.0625)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == expected
    assert losses_in_tensorboard(tmp_path) == expected


def test_a_new_run_in_a_used_place_starts_its_metrics_anew(tmp_path: Path) -> None:
    track(tmp_path, 0, {1: 0.5})
    track(tmp_path, 0, {1: 0.25})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.25]
    assert losses_in_tensorboard(tmp_path) == [(1, 0.25)]


def test_a_rewind_forgets_later_steps(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, 1)
    for step, loss in ((1, 0.5), (2, 0.25)):
        tracker.step(step, {"loss": loss, "accuracy": math.nan}, 10.0, last=False)
    tracker.rewind(1)
    tracker.step(2, {"loss": 0.125, "accuracy": math.nan}, 10.0, last=False)
    tracker.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 0.5), (2, 0.125)]
    assert losses_in_tensorboard(tmp_path) == [(1, 0.5), (2, 0.125)]


def test_every_so_many_steps_and_the_last_one_are_written_and_events_are_on_disk_at_once(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, 2)
    for step in (1, 2, 3, 4, 5):
        tracker.step(step, {"loss": 1.0 / step, "accuracy": 0.5}, 10.0, last=step == 5)
    assert [step for step, _ in losses_in_tensorboard(tmp_path)] == [2, 4, 5]
    tracker.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 5]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "[1]", "{}", '{"step": "two"}', "", "\ufffd"])
def test_a_torn_line_costs_no_other(torn: str, tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(f'{{"step": 1, "loss": 0.5}}\n{torn}\n{{"step": 3, "loss": 0.25}}\n')
    track(tmp_path, 3, {4: 0.125})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3, 4]


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, 1)
    tracker.validation(1, {"loss": math.inf, "accuracy": math.nan})
    tracker.close()
    (line,) = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "val_loss": None, "val_accuracy": None}
