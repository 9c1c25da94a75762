"""A run as Ray's own metrics, which Ray exports for Prometheus; `cluster/grafana_dashboard.json` draws them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge, Histogram

from metadist.callbacks import Callback, Fault, Status

if TYPE_CHECKING:
    from metadist.config import Config

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Boundaries of the histogram."""

COUNTERS = {
    "metadist_steps": "Outer steps done.",
    "metadist_tasks": "Tasks adapted while training.",
    "metadist_adapters_lost": "Adapters that died.",
    "metadist_learners_lost": "Learners that died.",
    "metadist_chunks_recomputed": "Chunks computed a second time after a loss.",
    "metadist_chunks_given_twice": "Chunks given to another adapter too, since the first was late with them.",
    "metadist_checkpoints": "Checkpoints begun.",
}
GAUGES = {
    "metadist_adapters_alive": "Adapters ready for work.",
    "metadist_staleness_steps": "By how many steps theta is behind that tasks are adapted from: `outer.lag`.",
    "metadist_tasks_per_second": "Mean since the start of the call.",
    "metadist_device_memory_bytes": "The most GPU memory that the tensors of one adapter have taken.",
    "metadist_query_loss": "Training tasks' query loss after adaptation, of the last step.",
    "metadist_query_accuracy": "Training tasks' query accuracy after adaptation, of the last step.",
    "metadist_validation_loss": "Of the last validation.",
    "metadist_validation_accuracy": "Of the last validation.",
}
HISTOGRAMS = {"metadist_step_seconds": "Where a step's time goes, by phase."}


class RayMetrics(Callback):
    """Every metric has the tag `run`, the run directory's name; Ray exports names with `ray_` before them."""

    def __init__(self) -> None:
        self._counters = {name: Counter(name, text, ("run",)) for name, text in COUNTERS.items()}
        self._gauges = {name: Gauge(name, text, ("run",)) for name, text in GAUGES.items()}
        self._seconds = Histogram(
            "metadist_step_seconds", HISTOGRAMS["metadist_step_seconds"], list(_SECONDS), ("run", "phase")
        )
        self._tags: dict[str, str] = {}
        self._tasks_a_step = 0
        self._recomputed = self._twice = self._lost = 0

    def on_start(self, config: Config, run_dir: str, step: int) -> None:
        self._tags = {"run": run_dir.rstrip("/").rpartition("/")[2]}
        self._tasks_a_step = config.training.meta_batch_size
        self._set("metadist_staleness_steps", config.outer.lag)

    def on_step(self, step: int, metrics: dict[str, float], status: Status) -> None:
        self._count("metadist_steps", 1)
        self._count("metadist_tasks", self._tasks_a_step)
        self._count("metadist_chunks_recomputed", status.chunks_recomputed - self._recomputed)
        self._count("metadist_adapters_lost", status.adapters_lost - self._lost)
        self._count("metadist_chunks_given_twice", status.chunks_given_twice - self._twice)
        self._recomputed, self._twice = status.chunks_recomputed, status.chunks_given_twice
        self._lost = status.adapters_lost
        self._set("metadist_adapters_alive", status.num_adapters)
        self._set("metadist_tasks_per_second", status.tasks_per_second)
        self._set("metadist_device_memory_bytes", status.peak_device_bytes)
        self._set("metadist_query_loss", metrics["loss"])
        self._set("metadist_query_accuracy", metrics["accuracy"])
        for phase, seconds in status.seconds._asdict().items():
            self._seconds.observe(seconds, self._tags | {"phase": phase})

    def on_evaluation(self, step: int, split: str, scores: dict[str, float]) -> None:
        if split == "val":
            self._set("metadist_validation_loss", scores["loss"])
            self._set("metadist_validation_accuracy", scores["accuracy"])

    def on_checkpoint(self, step: int) -> None:
        self._count("metadist_checkpoints", 1)

    def on_fault(self, step: int, fault: Fault, text: str) -> None:
        if fault == "learner_lost":
            self._count("metadist_learners_lost", 1)

    def _count(self, name: str, by: int) -> None:
        if by:
            self._counters[name].inc(by, self._tags)

    def _set(self, name: str, value: Any) -> None:
        if value == value:  # A regression's accuracy is NaN.
            self._gauges[name].set(value, self._tags)
