"""The learner: owns theta, the running statistics and the optimizer, and makes one outer step at a time.

A plain class: the in-process executor holds one, and Ray runs it as an actor.
"""

import time
from dataclasses import dataclass, field

import numpy as np
import torch

from metadist.core.meta_gradient import METRICS, Sums
from metadist.core.outer import OuterLoop, OuterSettings
from metadist.core.plan import Plan, Range
from metadist.core.reduction import reduce_tree
from metadist.distributed.seconds import Seconds
from metadist.errors import AdapterError, ClusterError
from metadist.experiment import Experiment

STATISTICS_MOMENTUM = 0.1
"""Weight of a step's batch-norm statistics in the running ones: torch's default."""


@dataclass(frozen=True)
class LearnerState:
    """All that a run is after `step` steps, as float32 vectors."""

    step: int
    theta: np.ndarray
    statistics: np.ndarray
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)
    """The optimizer's tensors by name, `exp_avg: [theta]` and so on; empty before the first step."""
    previous: np.ndarray | None = None
    """Theta and statistics as they were one step earlier, one vector; with `outer.lag` alone, after the first step."""

    @property
    def published(self) -> np.ndarray:
        """Theta and statistics, one vector, at which the next step's meta-gradients are taken."""
        return np.concatenate([self.theta, self.statistics]) if self.previous is None else self.previous


class Learner:
    """Holds the state of a run between steps."""

    def __init__(
        self, experiment: Experiment, outer: OuterSettings, num_steps: int, loop: type[OuterLoop] = OuterLoop
    ) -> None:
        torch.set_num_threads(experiment.threads)
        self._device = torch.device(experiment.learner_device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ClusterError(
                "scaling.learner_gpus is above 0, but torch sees no CUDA device where the learner is. Set it to 0, or"
                " start the run on a node where `metadist doctor` lists a GPU."
            )
        self._algorithm, self._layout = experiment.algorithm, experiment.theta
        self._statistics = experiment.initial_statistics.copy()
        self._loop = loop(outer, torch.tensor(experiment.initial_theta, device=self._device), num_steps)
        self._step = 0
        self._lag = outer.lag
        self._previous: np.ndarray | None = None
        self.seconds = Seconds()

    def publish(self) -> np.ndarray:
        """What the next step's meta-gradients are taken at, for the adapters: `newest`, or that of one step earlier."""
        return self.newest() if self._previous is None else self._previous

    def newest(self) -> np.ndarray:
        """Theta and the running statistics as one float32 vector."""
        return np.concatenate([self._loop.theta.detach().cpu().numpy(), self._statistics])

    def step(self, plan: Plan, sums: dict[Range, Sums]) -> dict[str, float]:
        """One outer step on the sums of a plan's ranges; gives the step's metrics.

        The mean is over the tasks that are in the sums. Raises NonFiniteError, and AdapterError where none is.
        """
        assert plan.step == self._step, f"the learner is at step {self._step}, not {plan.step}"
        began = time.perf_counter()
        total = reduce_tree(Range(0, plan.num_chunks), sums.get, Sums.__add__)
        tasks = plan.num_tasks - int(total.left_out[0])
        if not tasks:
            raise AdapterError(
                f"step {plan.step}: all of its {plan.num_tasks} tasks are bad, so there is nothing to step along. See"
                f" `metadist replay RUN --step {plan.step} --chunk 0`, correct their source and resume the run."
            )
        mean = Sums(*(part / np.float32(tasks) for part in total))
        reduced = time.perf_counter()
        before = self.newest() if self._lag else None
        report = self._loop.step(self._step, torch.from_numpy(mean.gradient).to(self._device))
        self._keep_constants()
        if self._statistics.size:
            momentum = np.float32(STATISTICS_MOMENTUM)
            self._statistics = (1 - momentum) * self._statistics + momentum * mean.statistics
        self._step += 1
        self._previous = before
        self.seconds = Seconds(reducing=reduced - began, stepping=time.perf_counter() - reduced)
        return dict(zip(METRICS, map(float, mean.metrics), strict=True)) | report

    def _keep_constants(self) -> None:
        """Meta-parameters that were constants of this step stand in theta as they were."""
        constants = self._algorithm.constants_at(self._step)
        kept = [name for name in constants if name in self._layout.shapes]
        theta = self._layout.unflatten(self._loop.theta.detach()) if kept else {}
        for name in kept:
            theta[name].copy_(constants[name])

    def state(self) -> LearnerState:
        """A copy of everything, for a checkpoint."""
        optimizer = {name: np.array(value.cpu().numpy()) for name, value in self._loop.optimizer_tensors().items()}
        theta = self._loop.theta.detach().cpu().numpy().copy()
        return LearnerState(self._step, theta, self._statistics.copy(), optimizer, self._previous)

    def restore(self, state: LearnerState) -> None:
        """Goes on from a checkpoint's state."""
        # The optimizer takes its state to where theta is, but for the number of steps, which it keeps here.
        optimizer = {name: torch.tensor(value) for name, value in state.optimizer.items()}
        self._loop.load(torch.tensor(state.theta), optimizer)
        self._statistics = np.array(state.statistics)
        self._step = state.step
        self._previous = state.previous if self._lag else None
