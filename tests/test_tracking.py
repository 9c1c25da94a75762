"""What a run leaves beside its checkpoints: metrics.jsonl, TensorBoard events, the progress line."""

import errno
import math
import time

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metadist.errors import MetadistError
from metadist.files import replacing
from metadist.tracking import METRICS_FILE, Progress, Tracker, read_metrics


def metrics_of(step):
    return {"loss": 1 / step, "accuracy": step / 100}


def track(directory, first_step, last_step, log_every=10, validate_every=20, total=None):
    """Does the steps after `first_step`, as a run does that goes on from there; not closed, as after a kill."""
    tracker = Tracker(directory, first_step, log_every)
    for step in range(first_step + 1, last_step + 1):
        tracker.step(step, metrics_of(step), 1000.0 + step, last=step == total)
        if step % validate_every == 0:
            tracker.validation(step, metrics_of(step))
    tracker.flush()
    return tracker


def lines(directory):
    return (directory / METRICS_FILE).read_text().splitlines()


def steps(directory):
    return [line["step"] for line in read_metrics(directory)]


def whole(directory, last_step, **settings):
    track(directory, 0, last_step, **settings).close()
    return (directory / METRICS_FILE).read_bytes()


def test_every_so_many_steps_and_the_last_have_a_line_and_validations_theirs(tmp_path):
    track(tmp_path, 0, 25, total=25).close()
    assert read_metrics(tmp_path) == [
        {"step": 10, "loss": 0.1, "accuracy": 0.1},
        {"step": 20, "loss": 0.05, "accuracy": 0.2},
        {"step": 20, "val_loss": 0.05, "val_accuracy": 0.2},
        {"step": 25, "loss": 0.04, "accuracy": 0.25},
    ]


def test_numbers_are_written_so_that_they_are_read_to_the_bit(tmp_path):
    tracker = Tracker(tmp_path, 0, 1)
    values = [0.1 + 0.2, 1e-300, 2 / 3, 123456789.123456789]
    for step, value in enumerate(values, start=1):
        tracker.step(step, {"loss": value}, 0.0, last=False)
    tracker.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_null(tmp_path, value):
    tracker = Tracker(tmp_path, 0, 1)
    tracker.step(1, {"loss": 2.0, "accuracy": value}, 0.0, last=False)
    tracker.close()
    assert lines(tmp_path) == ['{"step": 1, "loss": 2.0, "accuracy": null}']


@pytest.mark.parametrize(("killed_at", "checkpoint"), [(57, 40), (40, 40), (59, 30), (39, 35)])
def test_a_resumed_run_has_the_metrics_of_one_that_was_never_stopped(tmp_path, killed_at, checkpoint):
    track(tmp_path / "killed", 0, killed_at)
    track(tmp_path / "killed", checkpoint, 80).close()
    assert (tmp_path / "killed" / METRICS_FILE).read_bytes() == whole(tmp_path / "whole", 80)


def test_lines_after_the_checkpoint_are_cut_away_at_once(tmp_path):
    track(tmp_path, 0, 57)
    track(tmp_path, 30, 30)
    assert steps(tmp_path) == [10, 20, 20, 30]


def test_a_run_that_begins_anew_keeps_no_line(tmp_path):
    track(tmp_path, 0, 57)
    track(tmp_path, 0, 0)
    assert lines(tmp_path) == []


@pytest.mark.parametrize("length", range(1, len('{"step": 50, "loss": 0.02, "accuracy": 0.5}')))
def test_a_last_line_torn_anywhere_is_cut_away(tmp_path, length):
    track(tmp_path, 0, 49).close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 50, "loss": 0.02, "accuracy": 0.5}'[:length])
    track(tmp_path, 50, 50).close()
    assert steps(tmp_path) == [10, 20, 20, 30, 40, 40]


def test_a_last_line_without_its_end_is_kept_whole_and_the_next_begins_a_line(tmp_path):
    track(tmp_path, 0, 30).close()
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    track(tmp_path, 30, 40).close()
    assert steps(tmp_path) == [10, 20, 20, 30, 40, 40]


@pytest.mark.parametrize("garbage", [b"\x00" * 40, b"\xff\xfe\x80", b"7", b"null", b'{"loss": 1.0}', b'{"step": "x"}'])
def test_a_line_that_is_no_line_of_ours_is_cut_away(tmp_path, garbage):
    # A disk that lost power can leave zeros.
    track(tmp_path, 0, 30).close()
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(garbage)
    track(tmp_path, 30, 40).close()
    assert steps(tmp_path) == [10, 20, 20, 30, 40, 40]


def test_metrics_that_cannot_be_cut_back_stay_as_they_were(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text("before")
    expected = pytest.raises(MetadistError, match=rf"{METRICS_FILE}: could not be written \(No space left")
    with expected, replacing(path) as partial:
        partial.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == [METRICS_FILE]


@pytest.mark.parametrize("torn", ['{"step": 20, "lo', "[1]", "{}", "", "\ufffd"])
def test_a_torn_line_costs_no_other(tmp_path, torn):
    (tmp_path / METRICS_FILE).write_text(f'{{"step": 10, "loss": 0.5}}\n{torn}\n{{"step": 30, "loss": 0.25}}\n')
    track(tmp_path, 30, 40).close()
    assert steps(tmp_path) == [10, 30, 40, 40]


def test_rewinding_forgets_later_steps_and_goes_on(tmp_path):
    tracker = track(tmp_path, 0, 47)
    tracker.rewind(25)
    assert steps(tmp_path) == [10, 20, 20]
    for step in range(26, 51):
        tracker.step(step, metrics_of(step), 0.0, last=False)
    tracker.close()
    assert steps(tmp_path) == [10, 20, 20, 30, 40, 50]


def test_everything_reaches_the_disk_at_a_flush(tmp_path):
    tracker = Tracker(tmp_path, 0, 1)
    tracker.step(1, metrics_of(1), 0.0, last=False)
    tracker.flush()
    assert steps(tmp_path) == [1]


def scalars(directory, name):
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_events_are_on_disk_at_once(tmp_path):
    tracker = Tracker(tmp_path, 0, 1)
    tracker.step(1, metrics_of(1), 7.0, last=False)
    assert scalars(tmp_path, "speed/tasks_per_second") == [(1, 7.0)]
    tracker.close()


def test_a_run_that_begins_anew_hides_all_earlier_events(tmp_path):
    track(tmp_path, 0, 30).close()
    track(tmp_path, 0, 10).close()
    assert scalars(tmp_path, "train/loss") == [(10, pytest.approx(0.1))]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    # The checkpoint's own step is done and stays; 40 and 50 are done again, at another speed.
    track(tmp_path, 0, 57)
    tracker = Tracker(tmp_path, 30, 10)
    for step in range(31, 61):
        tracker.step(step, metrics_of(step), 9.0, last=False)
    tracker.close()
    expected = [(step, pytest.approx(1 / step)) for step in (10, 20, 30, 40, 50, 60)]
    assert scalars(tmp_path, "train/loss") == expected
    speeds = scalars(tmp_path, "speed/tasks_per_second")
    assert speeds == [(10, 1010.0), (20, 1020.0), (30, 1030.0), (40, 9.0), (50, 9.0), (60, 9.0)]
    assert scalars(tmp_path, "val/loss") == [(20, pytest.approx(0.05))]


def test_tensorboard_shows_each_step_once_after_a_rewind(tmp_path):
    tracker = track(tmp_path, 0, 47)
    tracker.rewind(20)
    for step in range(21, 41):
        tracker.step(step, metrics_of(step), 9.0, last=False)
    tracker.close()
    assert scalars(tmp_path, "speed/tasks_per_second") == [(10, 1010.0), (20, 1020.0), (30, 9.0), (40, 9.0)]


def shown_by(progress, clock, monkeypatch, console):
    """What one step after two seconds prints."""
    monkeypatch.setattr(time, "monotonic", lambda: clock + 2.0)
    with console.capture() as captured:
        progress.step(progress._total, {"loss": 0.125, "accuracy": 0.5}, adapters=3, lost=1, bad=0)
    return captured.get()


def test_progress_counts_the_steps_of_this_process_alone(monkeypatch):
    # 20 of 120 steps of 8 tasks in two seconds: 80 tasks/s, whatever was done before.
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    console = Console(width=200)
    progress = Progress(console, total_steps=120, first_step=100, meta_batch_size=8)
    shown = shown_by(progress, clock, monkeypatch, console)
    assert shown.strip() == "step 120/120  loss 0.1250  accuracy 50.0%  80 tasks/s  ETA 0:00  3 adapters  1 lost"
    assert progress.tasks_per_second == pytest.approx(80.0)
