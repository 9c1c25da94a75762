"""MLflow. A client of our own, since its fluent functions share one active run with the user's program."""

import os
import time
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from metadist.trackers.tracker import Tracker, flat

PARAMS_A_BATCH = 100
"""As many as MLflow takes at once."""


class MLflowTracker(Tracker):
    """One MLflow run, with the config's keys as its parameters."""

    name = "mlflow"

    def open(self, run_name: str, known: str | None, config: dict[str, Any]) -> str:
        self._client = MlflowClient()
        if known is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "metadist")
        experiment = self._client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run = str(self._client.create_run(place, run_name=run_name).info.run_id)
        params = [Param(key, str(value)) for key, value in flat(config)]
        for first in range(0, len(params), PARAMS_A_BATCH):
            self._client.log_batch(self._run, params=params[first : first + PARAMS_A_BATCH])
        return self._run

    def log(self, step: int, values: dict[str, float]) -> None:
        now = time.time_ns() // 10**6
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")
