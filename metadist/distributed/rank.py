"""A rank of the second backend: an adapter and a learner of its own, in step with those of all other ranks.

Every rank sums the meta-gradients of its ranges, receives those of the others, and makes the same
outer step, so that all hold the same theta without anybody sending it.
"""

from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist

from metadist.core.batch_norm import BatchNormPolicy
from metadist.core.meta_gradient import METRICS, EpisodeScores
from metadist.core.outer import OuterLoop, OuterSettings
from metadist.core.plan import Plan, Range
from metadist.distributed.adapter import Adapter
from metadist.distributed.all_reduce import PeerFailedError, share_exactly, share_fast
from metadist.distributed.learner import Learner, LearnerState
from metadist.distributed.receipt import Receipt
from metadist.distributed.zero import ShardedOuterLoop
from metadist.errors import MetadistError
from metadist.experiment import Experiment


@dataclass(frozen=True)
class RankArguments:
    """What every rank of a run is made of."""

    experiment: list[ray.ObjectRef]
    """The experiment in the object store, its arrays shared with the node."""
    outer: OuterSettings
    num_steps: int
    exact: bool
    shard_optimizer: bool


def run_rank(settings: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`: does what the conductor calls for, until there is no more."""
    conductor, rank = settings["conductor"], Rank(settings["arguments"])
    group = _enter(conductor)
    number = 0
    while (call := ray.get(conductor.next.remote(group, number))) is not None:
        number, method, arguments = call
        try:
            reply = getattr(rank, method)(*arguments)
        except (MetadistError, PeerFailedError) as error:
            # Errors of ours leave the group in step; any other ends the rank, and Ray Train starts all of them anew.
            reply = error
        conductor.reply.remote(group, number, dist.get_rank(), reply)


def _enter(conductor: Any) -> int:
    """The number of this group of ranks, by which the conductor tells it from an earlier one."""
    number = torch.zeros(1, dtype=torch.int64)
    if dist.get_rank() == 0:
        number += ray.get(conductor.enter.remote(dist.get_world_size()))
    dist.broadcast(number, 0)
    return int(number)


class Rank:
    """Each method is called on all ranks at once, with the same arguments."""

    def __init__(self, arguments: RankArguments) -> None:
        self._arguments = arguments

    def prepare(self, state: list[ray.ObjectRef]) -> dict[str, Any]:
        """Starts from a state, or from the start where it is None; gives this rank's numeric fingerprint."""
        arguments = self._arguments
        experiment: Experiment = ray.get(arguments.experiment[0])
        self._adapter = Adapter(experiment)
        loop = ShardedOuterLoop if arguments.shard_optimizer else OuterLoop
        self._learner = Learner(experiment, arguments.outer, arguments.num_steps, loop)
        saved: LearnerState | None = ray.get(state[0])
        if saved is not None:
            self._learner.restore(saved)
        return self._fingerprint()

    def _fingerprint(self) -> dict[str, Any]:
        """The first rank of each node compiles; the others then find its code in the node's cache."""
        is_first = ray.train.get_context().get_local_rank() == 0
        try:
            found = self._adapter.fingerprint() if is_first else None
        finally:
            dist.barrier()
        return found or self._adapter.fingerprint()

    def step(self, plan: Plan, assigned: list[list[Range]]) -> tuple[dict[str, float], Receipt]:
        """One outer step on the sums of the ranges that are assigned to each rank; gives its metrics and receipt."""
        experiment, published = self._adapter.experiment, self._learner.publish()
        sizes = [experiment.theta.size, experiment.initial_statistics.size, len(METRICS), 1]
        share = share_exactly if self._arguments.exact else share_fast
        own, receipt = {}, Receipt()
        try:
            for span in assigned[dist.get_rank()]:
                own[span] = self._adapter.sum_range(plan, span, published)
                receipt += self._adapter.take_receipt()
        except MetadistError as error:
            try:
                share(assigned, None, sizes, experiment.device)
            except PeerFailedError:
                raise error from None
        metrics = self._learner.step(plan, share(assigned, own, sizes, experiment.device))
        return metrics, receipt + Receipt(self._learner.seconds)

    def score(
        self, plan: Plan, assigned: list[list[Range]], inner_steps: int, policies: list[BatchNormPolicy]
    ) -> dict[Range, EpisodeScores]:
        """Scores of this rank's ranges of an evaluation."""
        published = self._learner.newest()
        return {
            span: self._adapter.score_range(plan, span, published, inner_steps, policies)
            for span in assigned[dist.get_rank()]
        }

    def state(self) -> list[ray.ObjectRef] | None:
        """Where the learner's state lies; rank 0 alone says it, since all have the same."""
        state = self._learner.state()
        return [ray.put(state)] if dist.get_rank() == 0 else None
