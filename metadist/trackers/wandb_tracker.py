"""Weights & Biases."""

import os
from typing import Any

import wandb

from metadist.trackers.tracker import Tracker


class WandbTracker(Tracker):
    """One W&B run, with the resolved config. Offline (`WANDB_MODE=offline`) its files lie in the run directory."""

    name = "wandb"

    def open(self, run_name: str, known: str | None, config: dict[str, Any]) -> str:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "metadist"),
            name=run_name,
            id=known,
            resume="allow" if known else None,
            config=config,
            dir=self._directory.local,
            reinit="create_new",
        )
        # By the run's steps instead of W&B's own, which may not go back as a run does after a loss.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        return str(self._run.id)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
