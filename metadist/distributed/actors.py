"""Adapter and learner as Ray's actors: where their arguments lie, and what of a result goes to whom."""

import gc
import time
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError

from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.meta_gradient import EpisodeScores, Sums
from metadist.core.outer import OuterSettings
from metadist.core.plan import Plan, Range
from metadist.core.reduction import reduce_tree
from metadist.distributed.adapter import Adapter
from metadist.distributed.learner import Learner, LearnerState
from metadist.distributed.receipt import Receipt
from metadist.distributed.seconds import Seconds

DEATHS = (RayActorError, WorkerCrashedError, OutOfMemoryError)
"""What a call raises whose actor has died; the last one where Ray killed it for its node's memory."""


class SumsLost(Exception):
    """Results of adapters were gone before they were added up; `args` is the list of their ranges."""


def fetched(spans: list[Range], sums: list[ray.ObjectRef]) -> dict[Range, Sums]:
    """Sums from wherever they lie, all on their way at once. Raises SumsLost."""
    try:
        return dict(zip(spans, ray.get(sums), strict=True))
    except ObjectLostError:
        pass  # Which of them, is seen one by one.
    values, lost = {}, []
    for span, reference in zip(spans, sums, strict=True):
        try:
            values[span] = ray.get(reference)
        except ObjectLostError:
            lost.append(span)
    if lost:
        raise SumsLost(lost)
    return values


def _forget_the_run_before(actor: object) -> None:
    """Frees what an actor that is prepared once more has held: that and what follows may not both fit the device."""
    if vars(actor):
        vars(actor).clear()
        gc.collect()


class AdapterActor:
    """An adapter as an actor. Errors of its making are raised by `prepare`, where they keep their type."""

    def prepare(self, experiment: list[ray.ObjectRef]) -> tuple[dict[str, Any], str]:
        """Takes the experiment from the object store, its arrays shared with the node; gives fingerprint and node."""
        _forget_the_run_before(self)
        self.adapter = Adapter(ray.get(experiment[0]))
        return self.adapter.fingerprint(), ray.get_runtime_context().get_node_id()

    def sample_ahead(self, plan: Plan, span: Range) -> None:
        """Of a call of `sum_range` that follows, and may still wait for its theta."""
        self.adapter.sample_ahead(plan, span)

    def sum_range(self, plan: Plan, span: Range, published: np.ndarray) -> tuple[Receipt, Sums]:
        """A small receipt for the driver, and the sums, which go to the learner without passing the driver."""
        sums = self.adapter.sum_range(plan, span, published)
        return self.adapter.take_receipt(), sums

    def combine(self, span: Range, parts: list[Range], sums: list[ray.ObjectRef]) -> tuple[Receipt, Sums]:
        """The sums of a range from those of its parts, in tree order. Raises SumsLost."""
        began = time.perf_counter()
        total = reduce_tree(span, fetched(parts, sums).get, Sums.__add__)
        return Receipt(Seconds(reducing=time.perf_counter() - began)), total

    def score_range(
        self, plan: Plan, span: Range, published: np.ndarray, inner_steps: int, policies: list[BatchNormPolicy]
    ) -> tuple[Receipt, EpisodeScores]:
        """Likewise for evaluation."""
        began = time.perf_counter()
        scores = self.adapter.score_range(plan, span, published, inner_steps, policies)
        return Receipt(Seconds(adapting=time.perf_counter() - began)), scores


class LearnerActor:
    """The learner as an actor."""

    def prepare(
        self, experiment: list[ray.ObjectRef], outer: OuterSettings, num_steps: int, state: LearnerState | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Starts from `state`; gives what the next step's meta-gradients are taken at, and the newest vector."""
        _forget_the_run_before(self)
        self.learner = Learner(ray.get(experiment[0]), outer, num_steps)
        if state is not None:
            self.learner.restore(state)
        return self.learner.publish(), self.learner.newest()

    def step(
        self, plan: Plan, spans: list[Range], sums: list[ray.ObjectRef]
    ) -> tuple[tuple[dict[str, float], Seconds], np.ndarray]:
        """One outer step's metrics and what it took, and the newest vector.

        Raises SumsLost, with nothing done, where the sums of a range are gone.
        """
        metrics = self.learner.step(plan, fetched(spans, sums))
        return (metrics, self.learner.seconds), self.learner.newest()

    def state(self) -> LearnerState:
        return self.learner.state()
