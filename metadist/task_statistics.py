"""Numbers that say what a task is to a run's model, from its support set alone."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metadist.core.episode import Examples
from metadist.core.params import Params
from metadist.features import features

if TYPE_CHECKING:
    from metadist.adaptation import LoadedRun

TINY = 1e-12
UNUSUAL = {
    "brightness": 0,
    "contrast": 0,
    "novelty": 1,
    "distance_to_classes": 1,
    "separation": -1,
    "gradient_norm": 0,
    "gradient_agreement": -1,
    "loss_before": 0,
    "loss_after": 1,
    "loss_left_out": 1,
}
"""Each statistic, and the side on which a task is unlike training: 1 above, -1 below, 0 either."""


@dataclass(frozen=True)
class FeatureSpace:
    """Where training examples lie in the model's feature space."""

    reference: Tensor
    """`[examples, *input_shape]`: what batch norm takes its statistics from."""
    mean: Tensor
    """`[features]`"""
    scale: Tensor
    """`[features]`: standard deviations."""
    centres: Tensor
    """`[classes, features]`: mean of each training class, or each training task in regression; whitened."""
    names: list[str]
    """Of the centres."""

    def place(self, run: "LoadedRun", x: Tensor) -> Tensor:
        """Standardised features `[examples, features]`."""
        return (features(run, x, self.reference) - self.mean) / self.scale


def task_statistics(run: "LoadedRun", space: FeatureSpace, support: Examples, ways: int) -> dict[str, float]:
    """Statistics by the names of `UNUSUAL`; those that need a second example of each class may be missing."""
    placed = space.place(run, support.x)
    inputs = support.x.flatten(1)
    found = {
        "brightness": float(inputs.mean()),
        "contrast": _log(inputs.std()),
        "novelty": _log(placed.square().mean()),
    }
    gradient = _gradient(run, support, ways)
    found["gradient_norm"] = _log(gradient.norm())
    before, after = _losses(run, support, support, ways)
    found["loss_before"], found["loss_after"] = before, after
    if run.spec.kind == "classification":
        centres, within = _centres(placed, support.y, ways)
        found["distance_to_classes"] = _log(torch.cdist(centres, space.centres).min(1).values.mean())
        if within is not None:
            found["separation"] = _log(centres.var(0).mean()) - _log(within)
    halves = _halves(support, ways if run.spec.kind == "classification" else None)
    if halves:
        first, second = halves
        one, other = (_gradient(run, half, ways) for half in halves)
        found["gradient_agreement"] = float(torch.cosine_similarity(one, other, dim=0, eps=TINY))
        left_out = [_losses(run, first, second, ways)[1], _losses(run, second, first, ways)[1]]
        found["loss_left_out"] = sum(left_out) / 2
    return {name: found[name] for name in UNUSUAL if name in found}


def _log(value: Tensor) -> float:
    return math.log(float(value) + TINY)


def _centres(placed: Tensor, y: Tensor, ways: int) -> tuple[Tensor, Tensor | None]:
    """Mean `[ways, features]` of each class, and the mean variance within classes, if any has two examples."""
    members = torch.nn.functional.one_hot(y, ways).to(placed.dtype)
    sizes = members.sum(0)
    centres = members.T @ placed / sizes[:, None]
    freedom = len(y) - ways
    within = (placed - centres[y]).square().sum(0).mean() / freedom if freedom else None
    return centres, within


def _gradient(run: "LoadedRun", support: Examples, ways: int) -> Tensor:
    """Gradient `[theta]` of the support loss at theta, before any inner step."""
    algorithm, layout = run.experiment.algorithm, run.experiment.theta
    network, _ = run.path(support, ways, 0)

    def loss(theta: Tensor) -> Tensor:
        meta = layout.unflatten(theta)
        phi: Params = algorithm.adapt(network, meta, support, 0)[-1]
        return network.loss_of(algorithm.predict(network, phi, support, support.x), support.y)

    return torch.func.grad(loss)(run.theta)


def _losses(run: "LoadedRun", support: Examples, query: Examples, ways: int) -> tuple[float, float]:
    """Loss on the query set before and after as many inner steps on the support set as the run takes at test."""
    algorithm = run.experiment.algorithm
    network, path = run.path(support, ways, run.config.inner_steps_at_test)
    with torch.no_grad():
        losses = [
            float(network.loss_of(algorithm.predict(network.at(step), path[step], support, query.x), query.y))
            for step in (0, len(path) - 1)
        ]
    return losses[0], losses[1]


def _halves(support: Examples, ways: int | None) -> tuple[Examples, Examples] | None:
    """Every other example of each class; None where a class has only one."""
    labels = support.y if ways else torch.zeros(len(support.x), dtype=torch.long)
    order = torch.zeros(len(labels), dtype=torch.long)
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        if len(members) < 2:
            return None
        order[members] = torch.arange(len(members))
    even = order % 2 == 0
    return Examples(support.x[even], support.y[even]), Examples(support.x[~even], support.y[~even])
