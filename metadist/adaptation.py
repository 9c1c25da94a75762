"""From a run to a model for your own data: `metadist.load(run_dir).adapt(x, y).predict(x)`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from metadist.config import Config
from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.episode import EpisodeSpec, Examples
from metadist.core.keys import TaskKey
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.task_source import TaskSource
from metadist.cross_validation import CrossValidation, cross_validate
from metadist.errors import ConfigError, DataError, ModelError, UserError
from metadist.evaluation import load_run_config, load_state
from metadist.experiment import Experiment, make_experiment, open_task
from metadist.held_out import Expectation, expected_accuracy
from metadist.run_directory import SPEC_FILE, RunDirectory
from metadist.tasks.remembered import RememberedSource, recalled

LOOKS_INVERTED = (
    "{place}: these images look like negatives of those that the run was trained on (dark where those are light)."
    " If they are, add --invert."
)
ROWS_AT_ONCE = 256
"""Examples that are predicted in one call."""
BRIGHTNESS_TASKS = 16
"""Training tasks that tell how bright images usually are."""
BRIGHTNESS_MARGIN = 0.2
"""Of 1: photographs, bright or dark, are not taken for negatives."""


@dataclass(frozen=True)
class AdaptedModel:
    """A model fitted to one support set, in the manner of scikit-learn's estimators.

    A prediction depends on the support set and its own example alone, never on its neighbours: where the
    model has batch norm, its statistics are the support set's (or the running ones, if the run has such).
    """

    run: "LoadedRun"
    network: Network
    support: Examples
    phi: Params
    """Adapted parameters."""
    steps: int
    """Inner steps that were taken."""
    classes_: np.ndarray
    """The user's own labels, in the order of the columns of `predict_proba`; empty in regression."""
    cross_validation: CrossValidation | None
    """None where none was asked for or, for want of a second example of any class, none is possible."""
    temperature: float = 1.0
    """Logits are divided by it, so that probabilities are calibrated on the cross-validated predictions."""

    def decision_function(self, x: Any) -> np.ndarray:
        """float32 `[examples, classes]` logits, or `[examples, targets]` in regression."""
        inputs = _inputs(x, self.run.spec)
        algorithm = self.run.experiment.algorithm
        with torch.no_grad():
            parts = [
                algorithm.predict(self.network, self.phi, self.support, part) for part in inputs.split(ROWS_AT_ONCE)
            ]
        outputs = torch.cat(parts) if parts else torch.zeros(0, max(1, len(self.classes_)))
        # A head may have more outputs than the task has classes.
        return outputs[:, : len(self.classes_)].numpy() if len(self.classes_) else outputs.numpy()

    def predict(self, x: Any) -> np.ndarray:
        """The user's labels `[examples]`, or values `[examples]` (`[examples, targets]` where there are several)."""
        outputs = self.decision_function(x)
        if len(self.classes_):
            return self.classes_[outputs.argmax(1)]
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def predict_proba(self, x: Any) -> np.ndarray:
        """Probabilities `[examples, classes]`, calibrated where cross-validation was possible."""
        if not len(self.classes_):
            raise UserError("predict_proba is for classification, and this run's task is regression. Use predict.")
        logits = torch.from_numpy(self.decision_function(x)) / self.temperature
        return logits.softmax(1).numpy()

    def score(self, x: Any, y: Any) -> float:
        """Accuracy, or R^2 in regression."""
        predicted = self.predict(x)
        if len(self.classes_):
            return float(np.mean(predicted == np.asarray(y)))
        targets = np.asarray(y, dtype=np.float64).reshape(predicted.shape)
        return float(1 - np.sum((targets - predicted) ** 2) / np.sum((targets - targets.mean(0)) ** 2))


@dataclass(frozen=True)
class LoadedRun:
    """A run's newest checkpoint, ready to adapt."""

    location: str
    config: Config
    experiment: Experiment
    theta: Tensor
    """`[theta]`"""
    statistics: Tensor
    """`[statistics]`: running ones of batch norm, where the run has them."""
    step: int

    @property
    def spec(self) -> EpisodeSpec:
        return self.experiment.source.spec

    def adapt(self, x: Any, y: Any, *, steps: int | None = None, cross_validation: bool = True) -> AdaptedModel:
        """Fits the model to a support set `x: [examples, *input_shape]`, `y: [examples]` of any labels.

        Images may be uint8 (0 to 255) or floats from 0 to 1. Classes may have different numbers of
        examples. `steps` is the number of inner steps; left out, cross-validation on the support set
        chooses it among 0 to the config's own number at test. Raises DataError where the data do not fit.
        """
        inputs = _inputs(x, self.spec)
        classes, targets = _targets(y, len(inputs), self.spec)
        self._check_ways(classes)
        if steps is not None and steps < 0:
            raise UserError(f"steps must be 0 or more, got {steps}. Leave it out to have it chosen.")
        support = Examples(inputs, targets)
        most = self.config.inner_steps_at_test if steps is None else steps
        found = cross_validate(self, support, len(classes), most, steps) if cross_validation else None
        chosen = most if found is None else found.steps
        network, path = self.path(support, len(classes), chosen)
        return AdaptedModel(
            run=self,
            network=network.at(len(path) - 1),
            support=support,
            phi=path[-1],
            steps=len(path) - 1,
            classes_=classes,
            cross_validation=found,
            temperature=found.temperature if found else 1.0,
        )

    def expected_accuracy(self, model: AdaptedModel) -> Expectation | None:
        """How well tasks of validation classes with the model's ways and shots go: all that one example a class allows.

        None in regression, and where the run's source has no such tasks.
        """
        sizes = tuple(torch.bincount(model.support.y).tolist()) if len(model.classes_) else ()
        return expected_accuracy(self, sizes, model.steps)

    def sees_negatives_in(self, x: np.ndarray) -> bool:
        """Whether images `x`, uint8, are nearer in brightness to the negatives of training images than to those."""
        if len(self.spec.input_shape) != 3 or x.dtype != np.uint8:
            return False
        if isinstance(self.experiment.source, RememberedSource):
            return False  # There is nothing to compare with.
        keys = [TaskKey(self.config.training.seed, "train", 0, task) for task in range(BRIGHTNESS_TASKS)]
        usual = float(self.experiment.source.sample(keys).query.x.mean())
        found = float(x.mean()) / 255
        return abs(found - usual) > abs(1 - found - usual) + BRIGHTNESS_MARGIN

    def path(self, support: Examples, ways: int, steps: int) -> tuple[Network, list[Params]]:
        """The network for this support set, and the parameters after 0 to `steps` inner steps on it."""
        experiment = self.experiment
        embedding = experiment.algorithm.model_output == "embedding"
        network = experiment.network.for_support_size(len(support.x)).bind(
            self.statistics,
            training=False,
            policy=_policy_in_use(experiment.network.policy),
            test_ways=ways if embedding else None,
        )
        with torch.no_grad():
            path = experiment.algorithm.adapt(network, experiment.theta.unflatten(self.theta), support, steps)
        return network, [{name: value.detach() for name, value in params.items()} for params in path]

    def _check_ways(self, classes: np.ndarray) -> None:
        if self.spec.kind != "classification":
            return
        if len(classes) < 2:
            raise DataError(f"the support set has {len(classes)} class, and 2 or more are needed. Add some.")
        head = self.experiment.algorithm.model_output == "predictions"
        if head and len(classes) > self.spec.output_size:
            raise DataError(
                f"the support set has {len(classes)} classes, and this run's model has {self.spec.output_size} outputs"
                f" (task.ways = {self.spec.output_size}). Leave classes out, or use a run of an algorithm that works on"
                " embeddings (proto_net, r2d2), which takes any number."
            )


def load(run_dir: str, *, step: int | None = None, config: Config | None = None) -> LoadedRun:
    """Loads a run directory's version in use (or its checkpoint of `step`) to adapt it to data of one's own.

    `config` is needed only where the run's task, model or algorithm is an object of your own program. The data
    that the run was trained on need not be at hand. Raises UserError where the directory holds no run.
    """
    directory, console = RunDirectory(run_dir), Console(stderr=True)
    try:
        config = config or load_run_config(directory)
        try:
            experiment = make_experiment(config, _source(directory, config, console))
        except (ConfigError, ModelError) as error:
            raise type(error)(f"{directory.location}: {error}") from None
        state = load_state(directory, experiment, step, console)
    finally:
        directory.close()
    theta, statistics = torch.tensor(state.theta), torch.tensor(state.statistics)
    return LoadedRun(directory.location, config, experiment, theta, statistics, state.step)


def _source(directory: RunDirectory, config: Config, console: Console) -> TaskSource:
    """The run's own source, or where its data cannot be had, what the run directory tells of it."""
    try:
        return open_task(config.task)
    except DataError as error:
        if not directory.exists(SPEC_FILE):
            raise
        console.print(Text(f"{error} Until then the run is used without its tasks.", "yellow"), soft_wrap=True)
        try:
            return recalled(directory.read(SPEC_FILE), str(error))
        except (ValueError, TypeError, LookupError):
            raise DataError(f"{directory.location}/{SPEC_FILE} is damaged, and {error}") from None


def _policy_in_use(policy: BatchNormPolicy) -> BatchNormPolicy:
    """One under which an example is predicted without seeing the others."""
    return "support" if policy == "transductive" else policy


def _inputs(x: Any, spec: EpisodeSpec) -> Tensor:
    """float32 `[examples, *input_shape]`. Raises DataError."""
    values = np.asarray(x)
    shape = spec.input_shape
    if values.dtype.kind not in "fiub":
        raise DataError(f"x must hold numbers, got values of type {values.dtype}. Encode them as this run's were.")
    if len(shape) == 3 and shape[0] == 1 and values.ndim == 3:
        values = values[:, None]  # Grey images without an axis for their one channel.
    if values.ndim != len(shape) + 1 or values.shape[1:] != shape:
        raise DataError(
            f"x must have the shape {['examples', *shape]} that this run was trained on, got {list(values.shape)}."
            f" {'Scale images to that size.' if len(shape) == 3 else 'Give the same features, in the same order.'}"
        )
    scaled = values.astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
    if not np.isfinite(scaled).all():
        row = int(np.argwhere(~np.isfinite(scaled))[0][0])
        raise DataError(f"x holds NaN or infinity, first in example {row}. Impute or remove it.")
    return torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))


def _targets(y: Any, examples: int, spec: EpisodeSpec) -> tuple[np.ndarray, Tensor]:
    """The user's labels in order, and targets as the network takes them."""
    values = np.asarray(y)
    if len(values) != examples or not examples:
        raise DataError(f"x has {examples} examples and y has {len(values)}. Give one target for each, at least one.")
    if spec.kind == "classification":
        if values.ndim != 1:
            raise DataError(f"y must be one label an example, got the shape {list(values.shape)}. Flatten it.")
        classes, ids = np.unique(values, return_inverse=True)
        return classes, torch.from_numpy(ids.astype(np.int64))
    if values.dtype.kind not in "fiub" or not np.isfinite(values.astype(np.float64)).all():
        raise DataError("y must be finite numbers, since this run's task is regression. Remove the others.")
    if values.size != examples * spec.output_size:
        raise DataError(
            f"y must have {spec.output_size} values an example, got the shape {list(values.shape)}. Add them."
        )
    targets = values.astype(np.float32).reshape(examples, spec.output_size)
    return np.empty(0), torch.from_numpy(targets)
