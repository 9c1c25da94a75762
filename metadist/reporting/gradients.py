"""Whether tasks pull theta the same way: cosines between their meta-gradients, and the noise in a meta-batch."""

from dataclasses import dataclass, field

import numpy as np
import torch

from metadist.core.keys import TaskKey
from metadist.core.meta_gradient import MetaGradient
from metadist.distributed.learner import LearnerState
from metadist.experiment import Experiment

TASKS = 32
MOST_NUMBERS = 2**26
"""Of all gradients together (256 MiB); larger models get fewer tasks, but at least LEAST_TASKS."""
LEAST_TASKS = 4


@dataclass(frozen=True)
class Alignment:
    """Of the meta-gradients of training tasks at one theta."""

    tasks: int
    cosines: np.ndarray = field(repr=False)
    """`[pairs]`."""
    noise_scale: float | None
    """Simple noise scale, tr(covariance) / |mean|^2, in tasks (McCandlish et al. 2018, arXiv:1812.06162, sec. 2.2),
    from unbiased estimates as in its appendix A.1: a meta-batch of so many tasks has as much noise as signal. None
    where the estimate of |mean|^2 is not positive: too few tasks to see a common direction."""

    @property
    def mean_cosine(self) -> float:
        return float(self.cosines.mean())


def alignment(experiment: Experiment, state: LearnerState) -> Alignment | None:
    """Over the first tasks of the step after `state`. None for algorithms that leave theta alone.

    Raises NonFiniteError where a meta-gradient is NaN or infinite.
    """
    if not experiment.algorithm.meta_learns:
        return None
    tasks = max(LEAST_TASKS, min(TASKS, MOST_NUMBERS // experiment.theta.size))
    compute = MetaGradient(experiment.algorithm, experiment.network, experiment.theta, strategy="loop", compile=False)
    theta, statistics = torch.tensor(state.theta), torch.tensor(state.statistics)
    gradients = []
    for task in range(tasks):
        keys = [TaskKey(experiment.run_seed, "train", state.step, task)]
        sums = compute.sum_chunk(theta, statistics, experiment.source.sample(keys), np.ones(1, np.float32), keys)
        gradients.append(sums.gradient)
    return alignment_of(np.stack(gradients))


def alignment_of(gradients: np.ndarray) -> Alignment:
    """Of `[tasks, theta]`; gradients of 0 have a cosine of 0 with every other."""
    products = gradients.astype(np.float64) @ gradients.astype(np.float64).T
    norms = np.sqrt(np.diag(products))
    count = len(gradients)
    pairs = np.triu_indices(count, 1)
    sizes = np.outer(norms, norms)[pairs]
    cosines = products[pairs] / np.where(sizes > 0, sizes, 1.0)
    one, all_of_them = float(np.mean(norms**2)), float(products.mean())
    signal = (count * all_of_them - one) / (count - 1)
    noise = (one - all_of_them) * count / (count - 1)
    return Alignment(count, cosines, noise / signal if signal > 0 else None)
