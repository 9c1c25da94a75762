"""What a sweep shows while it runs, and how it writes down the end of each trial."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from ray import tune as ray_tune
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.hparams import write_hparams
from metadist.sweeps.sweep import Sweep
from metadist.tracking import clock

SHOWN_GOING = 12
"""Rows of trials that have begun and not ended."""
SHOWN_ENDED = 8
"""Rows of ended trials in the live table, the best first."""


class SweepProgress(ray_tune.Callback):
    """A live table where the output is a terminal; a line for each trial that ended where it is none."""

    def __init__(self, sweep: Sweep, directory: SweepDirectory, numbers: dict[str, int], console: Console) -> None:
        """`numbers` are the trials', by Tune's ids."""
        self._sweep, self._directory, self._numbers, self._console = sweep, directory, numbers, console
        self._trials: list[Any] = []
        self._last: dict[int, dict[str, Any]] = {}
        """The last validation of each trial."""
        self._ended: dict[int, dict[str, Any]] = {}
        """Rows of trials that ended."""
        self._began = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts, and outcomes lie in the trials' directories."""
        return {}

    def __enter__(self) -> "SweepProgress":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._show(trials)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number = self._numbers[trial.trial_id]
        # One that was paused tells again what it told before.
        if result["step"] >= self._last.get(number, result)["step"]:
            self._last[number] = result
        self._show(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result
        is_done = last.get("step", 0) >= self._sweep.budget.steps
        self._end(trial, "failed" if "failed" in last else "finished" if is_done else "stopped")
        self._show(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial, "failed", _reason(trial))
        self._show(trials)

    def _end(self, trial: Any, outcome: str, error: str | None = None) -> None:
        number = self._numbers[trial.trial_id]
        self._directory.end(number, outcome, error)
        self._ended[number] = row = self._directory.row(number)
        write_hparams(self._sweep, self._directory.run(number), row)
        if self._live is None:
            self._console.print(Text(self._directory.line(number)))

    def _show(self, trials: list[Any]) -> None:
        self._trials = trials
        if self._live:
            self._live.update(self.table())

    def table(self) -> Table:
        """Trials that have begun and not ended, then the best of those that ended."""
        metric, keys = self._sweep.objective.metric, list(self._sweep.space)
        sign = -1 if self._sweep.objective.mode == "max" else 1
        scored = [row for row in self._ended.values() if row[metric] is not None and row["outcome"] != "failed"]
        scored.sort(key=lambda row: sign * row[metric])
        steps = sum(row["step"] for row in self._ended.values())
        steps += sum(result["step"] for number, result in self._last.items() if number not in self._ended)
        parts = [f"{len(self._ended)} of {self._sweep.num_trials} trials ended", f"{steps:,} steps"]
        parts += [clock(time.monotonic() - self._began)]
        parts += [f"best {metric} {scored[0][metric]:.4f}"] if scored else []
        table = Table("trial", "", "step", metric, *keys, title="  ".join(parts), title_justify="left")
        going = [trial for trial in self._trials if self._numbers[trial.trial_id] not in self._ended]
        # In their order, the running ones first.
        going.sort(key=lambda trial: trial.status != "RUNNING")
        for trial in going[:SHOWN_GOING]:
            number = self._numbers[trial.trial_id]
            last = self._last.get(number, {})
            row = {"trial": number, "step": last.get("step", 0), metric: last.get(metric)}
            row |= self._directory.settings(number)
            table.add_row(*self._cells(row, "running" if trial.status == "RUNNING" else "waiting"))
        if len(going) > SHOWN_GOING:
            table.add_row("..", f"{len(going) - SHOWN_GOING} more")
        table.add_section()
        for row in scored[:SHOWN_ENDED]:
            table.add_row(*self._cells(row, row["outcome"]))
        return table

    def _cells(self, row: dict[str, Any], state: str) -> list[str]:
        value = row[self._sweep.objective.metric]
        settings = [shown(row.get(key)) for key in self._sweep.space]
        return [str(row["trial"]), state, str(row["step"]), score(value), *settings]


def score(value: float | None) -> str:
    """A metric in a table."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def shown(value: Any) -> str:
    """A setting in a table; empty where it is not searched."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reason(trial: Any) -> str:
    """The last line of what ended a trial's process, without Ray's advice about dead processes."""
    # The driver's own file: Tune's get_error() reads a copy of it, which is not there yet or is that of an earlier end.
    place = Path(trial.error_file) if trial.error_file else None
    lines = place.read_text(errors="replace").strip().splitlines() if place and place.exists() else []
    return lines[-1].partition(" Some common causes include")[0] if lines else "its process ended"
