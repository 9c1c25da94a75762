"""A run as an estimator of scikit-learn, for its pipelines, searches and scores. Extra `sklearn`."""

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from metadist.adaptation import LoadedRun, load
from metadist.errors import DataError, UserError


class _MetaEstimator(BaseEstimator):
    """Fitting is adapting the run's starting point to the data."""

    _kind = ""

    def __init__(self, run: str | LoadedRun = "", *, steps: int | None = None, step: int | None = None) -> None:
        """`run` is a run directory, or what `metadist.load` gave.

        `steps` is the number of inner steps; left out, cross-validation on the data chooses it. `step` is the outer
        step of the checkpoint; left out, it is the version in use.
        """
        self.run = run
        self.steps = steps
        self.step = step

    def _loaded(self, X: np.ndarray) -> LoadedRun:
        del X
        run = load(self.run, step=self.step) if isinstance(self.run, str) else self.run
        if run.spec.kind != self._kind:
            raise UserError(
                f"{run.location} was trained on {run.spec.kind} tasks, and this estimator is for {self._kind}."
            )
        return run

    def _adapt(self, X: np.ndarray, y: np.ndarray) -> None:
        try:
            self.model_ = self._loaded(X).adapt(X, y, steps=self.steps)
        except DataError as error:
            # What scikit-learn's own estimators raise, and its searches expect.
            raise ValueError(str(error)) from None
        self.n_iter_ = self.model_.steps

    def predict(self, X: Any) -> np.ndarray:
        """Labels or values `[examples]` of `X: [examples, *input_shape]`."""
        check_is_fitted(self)
        return self.model_.predict(validate_data(self, X, reset=False, allow_nd=True))


class MetaClassifier(ClassifierMixin, _MetaEstimator):
    """Fits a run of classification tasks to `X: [examples, *input_shape]`, `y: [examples]` of any labels."""

    _kind = "classification"

    def fit(self, X: Any, y: Any) -> "MetaClassifier":
        """Raises ValueError where the data do not fit the run, and UserError where the run is none to fit."""
        X, y = validate_data(self, X, y, allow_nd=True)
        check_classification_targets(y)
        self._adapt(X, y)
        self.classes_ = self.model_.classes_
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """`[examples, classes]`, in the order of `classes_`."""
        check_is_fitted(self)
        return self.model_.predict_proba(validate_data(self, X, reset=False, allow_nd=True))

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits `[examples, classes]`; of two classes the second one's above the first one's, `[examples]`."""
        check_is_fitted(self)
        logits = self.model_.decision_function(validate_data(self, X, reset=False, allow_nd=True))
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits


class MetaRegressor(RegressorMixin, _MetaEstimator):
    """Fits a run of regression tasks to `X: [examples, features]`, `y: [examples]` or `[examples, targets]`."""

    _kind = "regression"

    def fit(self, X: Any, y: Any) -> "MetaRegressor":
        """Raises ValueError where the data do not fit the run, and UserError where the run is none to fit."""
        X, y = validate_data(self, X, y, allow_nd=True, multi_output=True, y_numeric=True)
        self._adapt(X, column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y)
        return self
