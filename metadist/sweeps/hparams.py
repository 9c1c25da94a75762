"""Trials for TensorBoard's HParams: their settings and their last validation, beside their own curves."""

from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams

from metadist.files import replacing
from metadist.sweeps.sweep import Sweep

HPARAMS_FILE = "events.out.tfevents.0000000000000000000.hparams"
"""One name, so that a trial which is told again to have ended has no second entry."""


def write_hparams(sweep: Sweep, run: Path, row: dict[str, Any]) -> None:
    """Writes an event file beside those of the trial's run, whose `val/loss` or `val/accuracy` is the metric."""
    metric = f"val/{sweep.objective.metric}"
    settings = {key: _plain(row[key]) for key in sweep.space if row[key] is not None}
    value = row[sweep.objective.metric]
    summaries = hparams(settings, {} if value is None else {metric: value})
    folder = run / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / HPARAMS_FILE) as partial, partial.open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(file_version="brain.Event:2").SerializeToString())
        for summary in summaries:
            records.write(Event(step=0, summary=summary).SerializeToString())


def _plain(value: Any) -> bool | float | int | str:
    return value if isinstance(value, bool | float | int | str) else str(value)
