"""Reptile: theta moves towards the parameters that each task ends with."""

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from metadist.algorithms.inner_loop import GradientBased, LearnedRates
from metadist.core.algorithm import Outcome
from metadist.core.episode import Examples
from metadist.core.network import Network
from metadist.core.params import Params
from metadist.core.settings import settings

SHIFT = "minibatch_shift"
"""Constant of an outer step: by how many places its minibatches are moved on in the support set."""


@settings
class Reptile(GradientBased):
    """Reptile (Nichol, Achiam and Schulman 2018, arXiv:1803.02999, Alg. 2).

    Inner loop:  phi_K by `inner_steps` steps on minibatches of the support set, one after another
    Outer loop:  meta-gradient = theta - phi_K, so that `outer.optimizer: sgd` with rate epsilon gives
                 theta + epsilon * mean over tasks of (phi_K - theta)

    The query set is only for metrics. The paper's inner Adam without momentum is `inner_optimizer: adam`
    with `inner_momentum: 0`; its averages of squares start anew in each task, where the authors' code
    carries them on from task to task. What `adapt` leaves out has the meta-gradient 0 and stays as it is.

    Minibatches are consecutive pieces of one permutation of the support set after another, as in the
    authors' code, but the same for all tasks of an outer step rather than drawn for each.
    """

    inner_batch: Annotated[int, Field(ge=1)] | None = None
    """Examples an inner step, at test as well; left out, the whole support set. May be larger than that: examples
    then come more than once."""

    # Nothing is differentiated through the inner loop, so these are no settings here.
    order: ClassVar[Literal["first"]] = "first"  # type: ignore[misc]
    learn_inner_lr: ClassVar[LearnedRates] = "no"  # type: ignore[misc]
    checkpoint_inner_steps: ClassVar[bool] = False  # type: ignore[misc]

    def constants_at(self, step: int) -> Params:
        shift = {} if self.inner_batch is None else {SHIFT: torch.tensor(float(step))}
        return super().constants_at(step) | shift

    def inner_loss(self, network: Network, params: Params, meta: Params, support: Examples, step: int) -> Tensor:
        if self.inner_batch is not None:
            size = support.x.shape[0]
            places = torch.tensor(minibatch(size, self.inner_batch, step), device=support.x.device)
            if SHIFT in meta:
                places = (places + meta[SHIFT].long()) % size
            support = Examples(support.x[places], support.y[places])
        return network.loss(params, support)

    def meta_gradient(
        self, network: Network, meta: Params, support: Examples, query: Examples
    ) -> tuple[Params, Outcome]:
        path = self.adapt(network, meta, support, self.inner_steps)
        phi = path[-1]
        loss, outputs = self.query_loss(network.at(self.inner_steps), phi, support, query)
        return {name: value - phi[name] for name, value in meta.items()}, Outcome(path, loss, outputs)


# The numbers do not depend on tensors: compiled code holds them as constants.
@torch.compiler.assume_constant_result
def minibatch(size: int, batch: int, step: int) -> list[int]:
    """Places in a support set of `size` examples that inner step `step` learns from.

    A function of these numbers alone, since an algorithm has no randomness of its own: tasks differ in
    their examples, which are drawn at random. But the support set is sorted by class, so under one fixed
    order the last minibatch would have the same classes in all tasks and theta would learn to make up
    for that: hence SHIFT, which lets every class stand in every place equally often while training.
    """
    passes = {place // size for place in range(step * batch, (step + 1) * batch)}
    orders = {number: np.random.Generator(np.random.Philox(number)).permutation(size) for number in passes}
    return [int(orders[place // size][place % size]) for place in range(step * batch, (step + 1) * batch)]
