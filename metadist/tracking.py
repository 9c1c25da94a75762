"""What a run tells while it goes on: metrics.jsonl, TensorBoard, a live line."""

import json
import math
import time
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
LINE_EVERY_S = 10.0
"""Between progress lines where the output is no terminal."""


class Tracker:
    """Appends metrics, which are the same to the bit for any number of workers, and shows speed, which is not."""

    def __init__(self, directory: Path, first_step: int, log_every: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS_FILE
        self._log_every = log_every
        self._file = _open_after(self._path, first_step)
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step or None)

    def step(self, step: int, metrics: dict[str, float], tasks_per_second: float, last: bool) -> None:
        """`step` steps are done; every `log_every`-th is written."""
        if step % self._log_every == 0 or last:
            self._line({"step": step} | metrics)
            for name, value in metrics.items():
                if not math.isnan(value):
                    self._writer.add_scalar(f"train/{name}", value, step)
            self._writer.add_scalar("speed/tasks_per_second", tasks_per_second, step)

    def validation(self, step: int, scores: dict[str, float]) -> None:
        self._line({"step": step} | {f"val_{name}": value for name, value in scores.items()})
        for name, value in scores.items():
            if not math.isnan(value):
                self._writer.add_scalar(f"val/{name}", value, step)

    def _line(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(without_nan(values)) + "\n")

    def rewind(self, step: int) -> None:
        """Forgets the lines of steps after `step`, which will be made again."""
        self._file.close()
        self._file = _open_after(self._path, step)

    def flush(self) -> None:
        """Everything so far reaches the disk: before each checkpoint, so that a resume finds it."""
        self._file.flush()
        self._writer.flush()

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """NaN as None: JSON has no NaN, and a regression has no accuracy."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    path = directory / METRICS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _open_after(path: Path, first_step: int) -> IO[str]:
    """Opens the metrics for appending, without lines of steps that will be done again."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= first_step and first_step > 0:
                    kept.append(line)
            except (ValueError, KeyError):
                break  # A line torn by a kill, after the last checkpoint.
    path.write_text("".join(f"{line}\n" for line in kept))
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

    def step(self, step: int, metrics: dict[str, float], adapters: int, lost: int) -> None:
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
        parts += [f"{self.tasks_per_second:,.0f} tasks/s", f"ETA {_clock(left)}", f"{adapters} adapters"]
        parts += [f"{lost} lost"] if lost else []
        line = Text("  ".join(parts))
        if self._live:
            self._live.update(line)
        else:
            self._console.print(line)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
