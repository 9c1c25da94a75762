"""What a support set gives without meta-learning: the predictors that an adapted model has to beat.

Each takes a run, for its architecture, and a support set, and gives scores `[examples, ways]` of new examples.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.core.episode import Examples
from metadist.core.params import Params
from metadist.features import features

if TYPE_CHECKING:
    from metadist.adaptation import LoadedRun

SCRATCH_STEPS = 50
SCRATCH_LR = 0.01
RIDGE = 1.0
"""Relative to the mean square of a feature."""

Baseline = Callable[["LoadedRun", Examples, int, Tensor], Tensor]


def nearest_centroid(run: "LoadedRun", support: Examples, ways: int, x: Tensor) -> Tensor:
    """Minus the squared distance of raw inputs to the mean of each class."""
    del run
    members = F.one_hot(support.y, ways).to(x.dtype)
    centroids = members.T @ support.x.flatten(1) / members.sum(0)[:, None]
    return -torch.cdist(x.flatten(1), centroids).square()


def transfer(run: "LoadedRun", support: Examples, ways: int, x: Tensor) -> Tensor:
    """A new last layer, by ridge regression on one-hot targets, on the features that theta has before its own."""
    seen = features(run, support.x, reference=support.x)
    new = features(run, x, reference=support.x)
    centre = seen.mean(0)
    seen, new = seen - centre, new - centre
    targets = F.one_hot(support.y, ways).to(x.dtype)
    # In the space of examples, of which there are fewer than features.
    kernel = seen @ seen.T
    ridge = RIDGE * kernel.diagonal().mean().clamp_min(torch.finfo(kernel.dtype).tiny) * torch.eye(len(kernel))
    return targets.mean(0) + new @ seen.T @ torch.linalg.solve(kernel + ridge, targets - targets.mean(0))


def scratch(run: "LoadedRun", support: Examples, ways: int, x: Tensor) -> Tensor:
    """The run's architecture from the weights that its seed drew, by Adam on the support set."""
    experiment = run.experiment
    network = experiment.network.for_support_size(len(support.x)).bind(run.statistics, training=False, policy="support")
    start = experiment.theta.unflatten(torch.tensor(experiment.initial_theta))
    phi: Params = {name: start[name].clone().requires_grad_() for name in network.parameters.shapes}
    embedding = experiment.algorithm.model_output == "embedding"
    head = torch.zeros(ways, network.output_size, requires_grad=embedding)
    optimizer = torch.optim.Adam([*phi.values(), *([head] if embedding else [])], lr=SCRATCH_LR)

    def scores(inputs: Tensor, reference: Tensor | None) -> Tensor:
        outputs = network.outputs(phi, inputs, reference)
        return outputs @ head.T if embedding else outputs

    for _ in range(SCRATCH_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(scores(support.x, None), support.y).backward()
        optimizer.step()
    with torch.no_grad():
        return scores(x, support.x)[:, :ways]


BASELINES: dict[str, Baseline] = {
    "nearest centroid of raw inputs": nearest_centroid,
    "transfer": transfer,
    "from scratch": scratch,
}


def accuracy(predictor: Baseline, run: "LoadedRun", support: Examples, ways: int, query: Examples) -> float:
    """Share of the query set that a baseline names rightly."""
    return float((predictor(run, support, ways, query.x).argmax(1) == query.y).float().mean())


def cross_validated(predictor: Baseline, run: "LoadedRun", support: Examples, ways: int, folds: int = 5) -> float:
    """Accuracy on support examples that are left out in turn; each class has two or more."""
    fold_of = torch.empty(len(support.y), dtype=torch.long)
    folds = min(folds, int(torch.bincount(support.y).min()))
    for label in range(ways):
        members = torch.nonzero(support.y == label).flatten()
        fold_of[members] = torch.arange(len(members)) % folds
    right = 0
    for fold in range(folds):
        out = fold_of == fold
        kept = Examples(support.x[~out], support.y[~out])
        right += int((predictor(run, kept, ways, support.x[out]).argmax(1) == support.y[out]).sum())
    return right / len(support.y)
