"""Runs as estimators of scikit-learn, by its own checks."""

from functools import cache

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs the extra `sklearn`")

from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from metadist.adaptation import LoadedRun
from metadist.algorithms import MAML, ProtoNet
from metadist.core.episode import EpisodeSpec
from metadist.errors import UserError
from metadist.estimators import MetaClassifier, MetaRegressor
from metadist.experiment import make_experiment
from metadist.models import MLP
from metadist.sections import ScalingSettings, TrainingSettings
from metadist.tasks.remembered import RememberedSource
from tests.builders import tiny_config


@cache
def untrained(kind: str, width: int, outputs: int) -> LoadedRun:
    """A run's starting point for inputs of any width, before its first step."""
    spec = EpisodeSpec(kind=kind, input_shape=(width,), output_size=outputs, support_size=10, query_size=10)
    algorithm = ProtoNet() if kind == "classification" else MAML(inner_lr=0.15, inner_steps=25)
    config = tiny_config(
        task=RememberedSource(spec, spec, "there are none"),
        model=MLP(hidden=(40,)),
        algorithm=algorithm,
        training=TrainingSettings(compile=False),
        scaling=ScalingSettings(num_workers=0),
    )
    experiment = make_experiment(config)
    return LoadedRun("untrained", config, experiment, torch.tensor(experiment.initial_theta), torch.zeros(0), 0)


class AnyWidthClassifier(MetaClassifier):
    """scikit-learn's checks come with data of many widths; a run has one."""

    def _loaded(self, X):
        return untrained("classification", X.shape[1], 5)


class AnyWidthRegressor(MetaRegressor):
    def _loaded(self, X):
        return untrained("regression", X.shape[1], 1)


def clouds(classes: int, each: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = 4 * random.normal(size=(classes, 1, 6)) + random.normal(size=(classes, each, 6))
    return x.reshape(-1, 6), np.repeat([f"class {number}" for number in range(classes)], each)


def test_a_run_works_in_pipelines_searches_and_scores() -> None:
    x, y = clouds(4, 9)
    estimator = make_pipeline(StandardScaler(), MetaClassifier(untrained("classification", 6, 5)))
    assert cross_val_score(estimator, x, y, cv=3).min() > 0.9
    search = GridSearchCV(estimator, {"metaclassifier__steps": [0, 1]}, cv=3).fit(x, y)
    assert set(search.best_params_) == {"metaclassifier__steps"}
    assert search.predict_proba(x).shape == (36, 4)


def test_it_gives_what_adapting_gives() -> None:
    x, y = clouds(3, 5)
    run = untrained("classification", 6, 5)
    found, model = MetaClassifier(run).fit(x, y), run.adapt(x, y)
    np.testing.assert_array_equal(found.predict_proba(x), model.predict_proba(x))
    np.testing.assert_array_equal(found.classes_, model.classes_)
    images = MetaClassifier(run)
    with pytest.raises(ValueError, match="must have the shape"):
        images.fit(np.zeros((4, 3, 2)), ["a", "b"] * 2)


def test_a_run_of_the_other_kind_is_refused() -> None:
    x, y = clouds(2, 3)
    with pytest.raises(UserError, match="was trained on regression tasks"):
        MetaClassifier(untrained("regression", 6, 1)).fit(x, y)
    with pytest.raises(UserError, match="is no run directory"):
        MetaClassifier("no/such/run").fit(x, y)


@parametrize_with_checks([AnyWidthClassifier(), AnyWidthRegressor()])
def test_scikit_learns_own_checks(estimator, check) -> None:
    check(estimator)
