"""What adapting does, over a fixed list of episodes: scores, which layers move, what is told apart, an embedding."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from metadist.config import Config
from metadist.core.algorithm import Algorithm
from metadist.core.episode import Examples
from metadist.core.keys import TaskKey
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.task_source import spec_of
from metadist.distributed.learner import LearnerState
from metadist.experiment import Experiment
from metadist.reporting.layers import LEAST_EXAMPLES, Layer, hsic, layers_of, representations
from metadist.scores import Score, mean_and_interval

MORE_STEPS = 2
"""Inner steps are tried up to so many times those at test: whether more would help is then seen, not guessed."""
MOST_MORE_STEPS = 10


@dataclass(frozen=True)
class AdaptedEpisode:
    """One episode, and the predictions of the model that was adapted to it."""

    key: TaskKey
    support: Examples
    query: Examples
    outputs: Tensor
    """`[query examples, output_size]` after the last inner step at test."""
    loss: float
    accuracy: float
    """NaN in regression."""

    @property
    def predicted(self) -> Tensor:
        """int64 `[query examples]`."""
        return self.outputs.argmax(-1)


@dataclass(frozen=True)
class Movement:
    """What the inner loop does to one layer."""

    layer: Layer
    change: Score | None
    """|phi - theta| / |theta| over the layer's parameters; None where theta is 0 or the layer has none that adapt."""
    cka: Score | None
    """Linear CKA (Kornblith et al. 2019, arXiv:1905.00414) between what the layer gives for the query set under theta
    and under phi, from unbiased estimates added up over episodes (Nguyen et al. 2021, arXiv:2010.15327, eq. 3); 1
    means the same up to rotation and scale. None where a query set has fewer than 4 examples."""


@dataclass(frozen=True)
class Adaptation:
    """Over all episodes; scores are `[episodes, inner steps + 1]`."""

    episodes: list[AdaptedEpisode] = field(repr=False)
    steps: int
    """Inner steps at test; scores go on beyond them where the algorithm has inner steps."""
    loss: np.ndarray = field(repr=False)
    accuracy: np.ndarray = field(repr=False)
    movements: list[Movement]
    """In the model's order; empty where the algorithm adapts in one go."""
    embedding: np.ndarray = field(repr=False)
    """float64 `[episodes, features]`: what the map of tasks is drawn from."""
    embedded: str
    """What that is, in words."""

    @property
    def is_classification(self) -> bool:
        return not np.isnan(self.accuracy).all()

    @property
    def by_difficulty(self) -> list[int]:
        """Numbers of the episodes, the hardest first: by accuracy, and by loss among equals."""
        accuracy = np.nan_to_num([episode.accuracy for episode in self.episodes])
        loss = np.array([episode.loss for episode in self.episodes])
        return [int(number) for number in np.lexsort((-loss, accuracy))]


def adapt_to_episodes(config: Config, experiment: Experiment, state: LearnerState, episodes: int) -> Adaptation:
    """Adapts to the first episodes of the run's evaluation, under its own batch-norm policy."""
    evaluation = config.evaluation
    spec = spec_of(experiment.source, evaluation.split)
    network = experiment.network.bind(torch.tensor(state.statistics), training=False, test_ways=spec.output_size)
    meta = experiment.theta.unflatten(torch.tensor(state.theta))
    layers = layers_of(network)
    tracks = _Tracks(network, layers)
    steps = config.inner_steps_at_test
    done, losses, accuracies, embeddings = [], [], [], []
    for number in range(episodes):
        key = TaskKey(evaluation.seed, evaluation.split, 0, number)
        batch = experiment.source.sample([key])
        spec.check(batch, [key], experiment.source)
        support, query = (Examples(part.x[0], part.y[0]) for part in batch)
        with torch.no_grad():
            path = experiment.algorithm.adapt(network, meta, support, _steps_tried(steps))
            scores = experiment.algorithm.losses_along(network, path, support, query)
            end = min(steps, len(path) - 1)
            loss, outputs = scores[end]
            losses.append([float(loss) for loss, _ in scores])
            accuracies.append([float(network.accuracy_of(out, query.y)) for _, out in scores])
            tracks.add(network, path[0], path[end], end, support, query)
            embeddings.append(_embedding(network.at(end), layers, meta, path[end], support))
        done.append(AdaptedEpisode(key, support, query, outputs, float(loss), accuracies[-1][end]))
    return Adaptation(
        episodes=done,
        steps=min(steps, len(losses[0]) - 1),
        loss=np.array(losses),
        accuracy=np.array(accuracies),
        movements=tracks.movements() if len(losses[0]) > 1 and steps else [],
        embedding=np.stack(embeddings),
        embedded=_embedded(network, experiment.algorithm),
    )


def _steps_tried(steps: int) -> int:
    return min(MORE_STEPS * steps, steps + MOST_MORE_STEPS)


class _Tracks:
    """Gathers, episode by episode, how far each layer goes and how alike it stays."""

    def __init__(self, network: Network, layers: list[Layer]) -> None:
        self.layers = layers
        self.changes: dict[str, list[float]] = {layer.name: [] for layer in layers}
        self.products: dict[str, list[tuple[float, float, float]]] = {layer.name: [] for layer in layers}

    def add(self, network: Network, theta: Params, phi: Params, end: int, support: Examples, query: Examples) -> None:
        for layer in self.layers:
            names = [name for name in layer.parameters if name in theta and name in phi]
            moved = sum(float((phi[name] - theta[name]).square().sum()) for name in names)
            size = sum(float(theta[name].square().sum()) for name in names)
            if size > 0:
                self.changes[layer.name].append(math.sqrt(moved / size))
        if len(query.y) < LEAST_EXAMPLES:
            return
        before, after = (
            representations(bound, params, query.x, self.layers, support.x)
            for bound, params in ((network.at(0), theta), (network.at(end), phi))
        )
        for name in before.keys() & after.keys():
            x, y = before[name], after[name]
            self.products[name].append((hsic(x, y), hsic(x, x), hsic(y, y)))

    def movements(self) -> list[Movement]:
        return [
            Movement(
                layer,
                mean_and_interval(np.array(self.changes[layer.name])) if self.changes[layer.name] else None,
                cka_of(np.array(self.products[layer.name])) if self.products[layer.name] else None,
            )
            for layer in self.layers
        ]


def cka_of(products: np.ndarray) -> Score | None:
    """CKA with its 95 % interval by the jackknife, of `[episodes, 3]`: HSIC(x, y), HSIC(x, x), HSIC(y, y).

    None where a layer gives the same for every example.
    """
    total = products.sum(0)

    def ratio(sums: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(sums[..., 0] / np.sqrt(sums[..., 1] * sums[..., 2]))

    value = float(ratio(total))
    if not math.isfinite(value):
        return None
    count = len(products)
    without = ratio(total - products)
    spread = (
        math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum())) if count > 1 else math.nan
    )
    return {"mean": value, "ci95": 1.96 * spread}


def _embedding(network: Network, layers: list[Layer], meta: Params, phi: Params, support: Examples) -> np.ndarray:
    if network.kind == "regression":
        names = [name for name in phi if name in meta and phi[name].shape == meta[name].shape]
        moved = torch.cat([(phi[name] - meta[name]).reshape(-1) for name in names])
        if bool(moved.any()):
            return moved.double().numpy()
    found = representations(network, phi, support.x, layers)
    names = [layer.name for layer in layers if layer.name in found]
    # The last layer of a classifier tells classes apart in the episode's random order; what it is given does not.
    is_head = network.output_size == found[names[-1]].shape[1] and len(names) > 1 if names else False
    chosen = found[names[-2 if is_head else -1]] if names else network.outputs(phi, support.x)
    return chosen.double().mean(0).numpy()


def _embedded(network: Network, algorithm: Algorithm) -> str:
    if network.kind == "regression" and algorithm.inner_steps:
        return "what adapting adds to the parameters, phi \N{MINUS SIGN} theta"
    return "the mean representation of the support set in the adapted model, before its last layer"


def principal_components(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[n, 2]`: rows on their first two principal components; and the shares of the variance these have."""
    centred = rows - rows.mean(0)
    # Through the n x n products: features may be as many as a model has parameters.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values = np.clip(values, 0, None)
    order = [-1, -2] if len(rows) > 1 else [-1, -1]
    places = vectors[:, order] * np.sqrt(values[order])
    # An eigenvector's sign is arbitrary: the largest entry is made positive, so that a map is drawn the same again.
    largest = np.abs(places).argmax(0)
    places *= np.where(places[largest, [0, 1]] < 0, -1, 1)
    total = values.sum()
    return places, values[order] / total if total else np.zeros(2)
