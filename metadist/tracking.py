"""What a run tells while it goes on: metrics.jsonl, TensorBoard, a live line."""

import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from metadist.files import parse_json, replacing, writing

METRICS_FILE = "metrics.jsonl"
LINE_EVERY_S = 10.0
"""Between progress lines where the output is no terminal."""


class Tracker:
    """Appends metrics, which are the same to the bit for any number of workers, and shows speed, which is not."""

    def __init__(self, directory: Path, first_step: int, log_every: int) -> None:
        self._directory = directory
        self._log_every = log_every
        with writing(str(directory)):
            (directory / "tensorboard").mkdir(parents=True, exist_ok=True)
            self._file = open_after(directory / METRICS_FILE, first_step)
            self._events = _EventFile(directory / "tensorboard", first_step)

    def step(self, step: int, metrics: dict[str, float], tasks_per_second: float, last: bool) -> None:
        """`step` steps are done; every `log_every`-th is written."""
        if step % self._log_every == 0 or last:
            self._write(step, "", "train", metrics)
            self._write_events(step, "speed", {"tasks_per_second": tasks_per_second})

    def validation(self, step: int, scores: dict[str, float]) -> None:
        self._write(step, "val_", "val", scores)

    def timeline(self, step: int, seconds: dict[str, float]) -> None:
        """Where the time of the last steps went, to TensorBoard."""
        self._write_events(step, "seconds", seconds)

    def _write(self, step: int, prefix: str, group: str, values: dict[str, float]) -> None:
        line = {"step": step} | {f"{prefix}{name}": value for name, value in values.items()}
        with writing(str(self._directory / METRICS_FILE)):
            self._file.write(json.dumps(without_nan(line)) + "\n")
        self._write_events(step, group, values)

    def _write_events(self, step: int, group: str, values: dict[str, float]) -> None:
        with writing(str(self._directory / "tensorboard")):
            for name, value in values.items():
                if not math.isnan(value):
                    self._events.add_scalar(f"{group}/{name}", value, step)

    def rewind(self, step: int) -> None:
        """Forgets the lines of steps after `step`, which will be made again."""
        with writing(str(self._directory / METRICS_FILE)):
            self._file.close()
            self._file = open_after(self._directory / METRICS_FILE, step)
        with writing(str(self._directory / "tensorboard")):
            self._events.forget_after(step)

    def flush(self) -> None:
        """Everything so far reaches the disk: before each checkpoint, so that a resume finds it."""
        with writing(str(self._directory / METRICS_FILE)):
            self._file.flush()

    def close(self) -> None:
        self._events.close()
        with writing(str(self._directory / METRICS_FILE)):
            self._file.close()


class _EventFile:
    """A TensorBoard event file. SummaryWriter would write it in a thread, which can tell nobody of a full disk."""

    def __init__(self, directory: Path, first_step: int) -> None:
        # Names sort by time: TensorBoard reads them in that order.
        path = directory / f"events.out.tfevents.{time.time_ns():019d}.{os.getpid()}"
        self._file = path.open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._add(file_version="brain.Event:2")
        self.forget_after(first_step)

    def forget_after(self, step: int) -> None:
        """A new session: TensorBoard hides what earlier ones wrote of later steps."""
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._add(step=step, summary=scalar(name, value))

    def _add(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        self._file.close()


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as None: JSON has neither, and a regression has no accuracy."""
    return {k: None if isinstance(value, float) and not math.isfinite(value) else value for k, value in values.items()}


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    path = directory / METRICS_FILE
    return [parse_json(line) for line in path.read_text().splitlines()] if path.exists() else []


def open_after(path: Path, last_step: int, *, first_step: int = 1) -> IO[str]:
    """Opens a file of lines with a `step` for appending, without torn ones and those of steps to be done again."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if first_step <= parse_json(line)["step"] <= last_step:
                    kept.append(line)
            except (ValueError, LookupError, TypeError):
                continue  # Torn by a kill.
    with replacing(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    return path.open("a", encoding="utf-8")


class Progress:
    """The live line: step, loss, accuracy, tasks/s, ETA, adapters alive."""

    def __init__(self, console: Console, total_steps: int, first_step: int, meta_batch_size: int) -> None:
        self._console = console
        self._total, self._first, self._tasks = total_steps, first_step, meta_batch_size
        self._began = self._shown = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self.tasks_per_second = 0.0

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def step(self, step: int, metrics: dict[str, float], adapters: int, lost: int, bad: int) -> None:
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        self.tasks_per_second = (step - self._first) * self._tasks / seconds
        if self._live is None and now - self._shown < LINE_EVERY_S and step < self._total:
            return
        self._shown = now
        left = seconds / (step - self._first) * (self._total - step)
        accuracy = metrics["accuracy"]
        parts = [f"step {step}/{self._total}", f"loss {metrics['loss']:.4f}"]
        parts += [] if math.isnan(accuracy) else [f"accuracy {accuracy:.1%}"]
        parts += [f"{self.tasks_per_second:,.0f} tasks/s", f"ETA {clock(left)}", f"{adapters} adapters"]
        parts += [f"{lost} lost"] if lost else []
        parts += [f"{bad} bad episodes left out"] if bad else []
        line = Text("  ".join(parts))
        if self._live:
            self._live.update(line)
        else:
            self._console.print(line)


def clock(seconds: float) -> str:
    """A duration as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
