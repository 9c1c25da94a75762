"""Experiment trackers that a run tells about itself: `run.trackers: [mlflow, wandb]`, each a callback.

Where they write, and as whom, they take from environment variables of their own: MLFLOW_TRACKING_URI and
MLFLOW_EXPERIMENT_NAME, WANDB_PROJECT, WANDB_API_KEY, WANDB_MODE and others. A resumed run goes on in the
tracker's run, whose id is in the run directory.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Literal

from metadist.errors import UserError
from metadist.run_directory import RunDirectory
from metadist.trackers.tracker import Tracker

TrackerName = Literal["mlflow", "wandb"]

_CLASSES = {"mlflow": "MLflowTracker", "wandb": "WandbTracker"}


def make_trackers(names: Sequence[TrackerName], directory: RunDirectory) -> list[Tracker]:
    """Those that are named, for the run in a directory. Raises UserError where one is not installed."""
    trackers = []
    for name in dict.fromkeys(names):
        try:
            module = import_module(f"metadist.trackers.{name}_tracker")
        except ModuleNotFoundError as error:
            raise UserError(
                f"run.trackers: {name} cannot be imported ({error}). Install it with pip install 'metadist[{name}]',"
                " or leave it out."
            ) from None
        trackers.append(getattr(module, _CLASSES[name])(directory))
    return trackers
