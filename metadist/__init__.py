"""metadist: distributed meta-training on Ray.

config = metadist.load_config("configs/sinusoid_maml.yaml")
result = metadist.MetaTrainer(config).fit()
metadist.evaluate(result.run_dir)
metadist.load(result.run_dir).adapt(x, y).predict(more_x)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metadist.adaptation import AdaptedModel, LoadedRun, load
    from metadist.callbacks import Callback
    from metadist.comparison import compare
    from metadist.config import Config, load_config
    from metadist.core.algorithm import Algorithm
    from metadist.core.episode import EpisodeBatch, EpisodeSpec, Examples
    from metadist.core.keys import TaskKey, generator
    from metadist.core.outer import OuterSettings
    from metadist.core.settings import settings
    from metadist.errors import MetadistError, UserError
    from metadist.evaluation import evaluate
    from metadist.paired import Comparison
    from metadist.reporting.report import Report, report
    from metadist.scores import Evaluation
    from metadist.sections import (
        CheckpointSettings,
        EvaluationSettings,
        FailureSettings,
        RunSettings,
        ScalingSettings,
        TrainingSettings,
    )
    from metadist.shots import evaluate_shots
    from metadist.training import MetaTrainer, Result
    from metadist.tuning import tune
    from metadist.updating import Update, update

__version__ = "0.1.0"

_HOMES = {
    "metadist.adaptation": ("AdaptedModel", "LoadedRun", "load"),
    "metadist.callbacks": ("Callback",),
    "metadist.comparison": ("compare",),
    "metadist.config": ("Config", "load_config"),
    "metadist.core.algorithm": ("Algorithm",),
    "metadist.core.episode": ("EpisodeBatch", "EpisodeSpec", "Examples"),
    "metadist.core.keys": ("TaskKey", "generator"),
    "metadist.core.outer": ("OuterSettings",),
    "metadist.core.settings": ("settings",),
    "metadist.errors": ("MetadistError", "UserError"),
    "metadist.evaluation": ("evaluate",),
    "metadist.paired": ("Comparison",),
    "metadist.reporting.report": ("Report", "report"),
    "metadist.scores": ("Evaluation",),
    "metadist.sections": (
        "CheckpointSettings",
        "EvaluationSettings",
        "FailureSettings",
        "RunSettings",
        "ScalingSettings",
        "TrainingSettings",
    ),
    "metadist.shots": ("evaluate_shots",),
    "metadist.training": ("MetaTrainer", "Result"),
    "metadist.tuning": ("tune",),
    "metadist.updating": ("Update", "update"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdaptedModel",
    "Algorithm",
    "Callback",
    "CheckpointSettings",
    "Comparison",
    "Config",
    "EpisodeBatch",
    "EpisodeSpec",
    "Evaluation",
    "EvaluationSettings",
    "Examples",
    "FailureSettings",
    "LoadedRun",
    "MetaTrainer",
    "MetadistError",
    "OuterSettings",
    "Report",
    "Result",
    "RunSettings",
    "ScalingSettings",
    "TaskKey",
    "TrainingSettings",
    "Update",
    "UserError",
    "compare",
    "evaluate",
    "evaluate_shots",
    "generator",
    "load",
    "load_config",
    "report",
    "settings",
    "tune",
    "update",
]


def __getattr__(name: str) -> Any:
    # Names are imported when first used, so that `import metadist` loads neither torch nor Ray.
    if name not in _HOME_OF:
        raise AttributeError(f"module 'metadist' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
