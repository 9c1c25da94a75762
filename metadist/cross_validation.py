"""How far to trust an adapted model, told from its support set alone."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metadist.core.episode import Examples

if TYPE_CHECKING:
    from metadist.adaptation import LoadedRun

LEAVE_ONE_OUT_UP_TO = 60
"""Support sets of so many examples leave out one after another; larger ones are cut into `FOLDS`."""
FOLDS = 10
LOG_TEMPERATURES = torch.linspace(-3, 3, 601)
Z95 = 1.96


@dataclass(frozen=True)
class CrossValidation:
    """Predictions for support examples by models that did not see them.

    A model that leaves examples out has fewer shots than the final one, so that the estimate is rather
    too low. The number of inner steps is chosen by the loss on the same examples, which makes it rather
    too high; it is one choice among few.
    """

    folds: int
    scored: int
    """Examples with a prediction: those whose class still has another one."""
    unscored: int
    """Examples that are the only one of their class: left out, nobody could name their class."""
    steps: int
    """Inner steps with the least loss, or as many as were asked for."""
    loss_per_step: list[float]
    """Mean cross entropy or squared error of the left-out examples after 0, 1, .. inner steps."""
    score: float
    """Accuracy, or R^2 in regression."""
    interval: tuple[float, float] | None
    """95 % (Wilson 1927) of the accuracy; None in regression."""
    temperature: float
    """That makes the left-out examples likeliest, under a standard normal prior of its logarithm."""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def cross_validate(
    run: "LoadedRun", support: Examples, ways: int, most_steps: int, fixed_steps: int | None
) -> CrossValidation | None:
    """Leave-one-out or stratified k-fold over a support set; None where no example can be left out."""
    classes = run.spec.kind == "classification"
    sizes = torch.bincount(support.y, minlength=ways)[support.y] if classes else torch.full((len(support.x),), 2)
    scorable = torch.nonzero(sizes > 1).flatten()
    if not len(scorable) or len(support.x) < 3:
        return None
    fold_of = _folds(support, scorable, classes)
    outputs, targets = [], []
    for fold in range(int(fold_of.max()) + 1):
        left_out = fold_of == fold
        kept = Examples(support.x[~left_out], support.y[~left_out])
        network, path = run.path(kept, ways, most_steps)
        algorithm = run.experiment.algorithm
        with torch.no_grad():
            each = [
                algorithm.predict(network.at(step), phi, kept, support.x[left_out]) for step, phi in enumerate(path)
            ]
        outputs.append(torch.stack(each, dim=1))
        targets.append(support.y[left_out])
    found, truth = torch.cat(outputs), torch.cat(targets)
    if classes:
        found = found[..., :ways]
    losses = [float(_loss(found[:, step], truth, classes)) for step in range(found.shape[1])]
    steps = min(range(len(losses)), key=losses.__getitem__) if fixed_steps is None else len(losses) - 1
    chosen = found[:, steps]
    right = int((chosen.argmax(1) == truth).sum()) if classes else 0
    return CrossValidation(
        folds=int(fold_of.max()) + 1,
        scored=len(scorable),
        unscored=len(support.x) - len(scorable),
        steps=steps,
        loss_per_step=losses,
        score=right / len(truth) if classes else _r_squared(chosen, truth),
        interval=wilson(right, len(truth)) if classes else None,
        temperature=_temperature(chosen, truth) if classes else 1.0,
    )


def _folds(support: Examples, scorable: Tensor, classes: bool) -> Tensor:
    """The fold `[examples]` in which each is left out; -1 for those that never are.

    No fold takes all examples of a class: sorted by class, neighbours go to different folds.
    """
    fold_of = torch.full((len(support.x),), -1)
    if len(support.x) <= LEAVE_ONE_OUT_UP_TO:
        fold_of[scorable] = torch.arange(len(scorable))
        return fold_of
    order = scorable[torch.argsort(support.y[scorable], stable=True)] if classes else scorable
    fold_of[order] = torch.arange(len(order)) % FOLDS
    return fold_of


def _loss(outputs: Tensor, targets: Tensor, classes: bool) -> Tensor:
    return F.cross_entropy(outputs, targets) if classes else F.mse_loss(outputs, targets)


def _r_squared(outputs: Tensor, targets: Tensor) -> float:
    return float(1 - (outputs - targets).square().sum() / (targets - targets.mean(0)).square().sum())


def _temperature(logits: Tensor, targets: Tensor) -> float:
    scaled = logits / LOG_TEMPERATURES.exp()[:, None, None]
    likelihoods = F.cross_entropy(scaled.flatten(0, 1), targets.repeat(len(scaled)), reduction="none")
    penalised = likelihoods.view(len(scaled), -1).sum(1) + LOG_TEMPERATURES.square() / 2
    return float(LOG_TEMPERATURES[penalised.argmin()].exp())


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22, p. 209)."""
    share, square = successes / trials, Z95**2
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = Z95 / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)
