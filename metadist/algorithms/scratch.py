"""Training from scratch on the support set: what meta-learning must beat."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from metadist.algorithms.inner_loop import GradientBased
from metadist.algorithms.inner_optimizers import InnerOptimizer
from metadist.core.algorithm import Outcome
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings


@settings
class Scratch(GradientBased):
    """No meta-learning: each task is learned by many gradient steps from the start that the run's seed drew.

    Inner loop:  phi_0 = theta;  phi_{k+1} = phi_k - inner_lr * Adam's direction
    Outer loop:  meta-gradient = 0 by definition, so that theta stays as it is

    One outer step is enough, since all have the same metrics but for the tasks that they draw. A baseline
    of ours, after no paper.
    """

    meta_learns: ClassVar[bool] = False

    inner_lr: Annotated[float, Field(gt=0)] = 0.001
    inner_steps: Annotated[int, Field(ge=0)] = 100
    inner_optimizer: InnerOptimizer = "adam"
    order: Literal["first"] = "first"
    """Nothing is differentiated through the inner loop, so there is nothing to choose, here and below."""
    learn_inner_lr: Literal["no"] = "no"
    checkpoint_inner_steps: Literal[False] = False

    def meta_gradient(
        self, network: Network, meta: Params, support: Examples, query: Examples
    ) -> tuple[Params, Outcome]:
        _, outcome = self.objective(network, meta, support, query)
        return {name: torch.zeros_like(value) for name, value in meta.items()}, outcome
