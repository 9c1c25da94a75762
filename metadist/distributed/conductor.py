"""The conductor: an actor that holds Ray Train's trainer, calls all ranks at once and collects their replies.

Ray Train's workers run one function from beginning to end, so the driver cannot call them as it calls
actors: they ask the conductor for the next call instead.
"""

import os
import tempfile
import threading
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from metadist.distributed.actors import DEATHS
from metadist.distributed.placement import resources_per_adapter
from metadist.distributed.rank import RankArguments, run_rank
from metadist.errors import LearnerLostError, RanksResizedError, first_line
from metadist.sections import ScalingSettings

Call = tuple[int, str, tuple[Any, ...]]
"""Its number, the name of a method of `Rank`, the arguments."""

ROOM_S = 15.0
"""How long a group waits for its room until Ray Train counts again how many ranks have some: just after a node was lost
it still counts that one. The driver gives up after `scaling.start_timeout_s`."""
THREADS_BESIDE_RANKS = 8
"""Of the conductor: for `fit`, for the driver's calls, and for threads of a group that is gone."""


class Conductor:
    """Ranks come in groups, numbered from 1: where one rank is lost, Ray Train starts all of them anew."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._group = self._size = 0
        self._lost: str | None = None
        self._ranks_lost = 0
        self._call: Call = (0, "", ())
        self._replies: dict[int, Any] = {}
        self._closed = False

    def fit(self, arguments: RankArguments, scaling: ScalingSettings, max_failures: int, me: Any) -> None:
        """Runs the ranks until `close`; `me` is this actor's handle. Raises what Ray Train does not recover from."""
        # Paths in a config are relative to where the run was started, not to a directory of the trainer.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(min(ROOM_S, scaling.start_timeout_s / 4)))
        # The ignored types: checkers see Ray Train v1, where the driver runs v2.
        with tempfile.TemporaryDirectory(prefix="metadist-train-") as scratch:
            TorchTrainer(
                run_rank,
                train_loop_config={"conductor": me, "arguments": arguments},
                # Sums go from GPU to GPU; shares of theta between the learners, which are on the CPU.
                torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if scaling.use_gpu else "gloo"),
                scaling_config=ScalingConfig(
                    num_workers=scaling.num_workers,  # type: ignore[arg-type]
                    use_gpu=scaling.use_gpu,
                    resources_per_worker=resources_per_adapter(scaling),
                    label_selector=scaling.label_selector or None,  # type: ignore[call-arg]
                    placement_strategy=scaling.placement_strategy,
                ),
                run_config=RunConfig(
                    name="ranks",
                    # The run directory is the driver's: Ray Train keeps only its own notes, and those for nobody.
                    storage_path=scratch,
                    failure_config=FailureConfig(max_failures=max_failures),
                    callbacks=[_Watch(me)],  # type: ignore[list-item]
                ),
            ).fit()

    def enter(self, size: int) -> int:
        """A new group of so many ranks is there; gives its number."""
        with self._changed:
            self._group, self._size, self._lost = self._group + 1, size, None
            # A call to an earlier group is not for this one.
            self._call = (0, "", ())
            self._changed.notify_all()
            return self._group

    def lost(self, reason: str, ranks: int) -> None:
        """The group that is there will be replaced, since so many of its ranks died or raised."""
        with self._changed:
            self._lost = reason
            self._ranks_lost += ranks
            self._changed.notify_all()

    def next(self, group: int, after: int) -> Call | None:
        """The call that follows number `after`, as soon as it is there; None where a rank is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._call[0] > after or self._closed or self._group != group)
            return None if self._closed or self._group != group else self._call

    def reply(self, group: int, number: int, rank: int, value: Any) -> None:
        """What a rank's call gave, or the error that it raised."""
        with self._changed:
            if (group, number) == (self._group, self._call[0]):
                self._replies[rank] = value
                self._changed.notify_all()

    def group(self, after: int) -> tuple[int, int]:
        """Number and size of the group of ranks, once it is there and is not number `after`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._group != after and self._lost is None))
            return self._group, self._size

    def ask(self, group: int, method: str, *arguments: Any) -> list[Any] | LearnerLostError:
        """Calls a method of every rank; gives their replies by rank, or how the group was lost."""
        with self._changed:
            self._call, self._replies = (self._call[0] + 1, method, arguments), {}
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._over(group) or len(self._replies) == self._size)
            if not self._over(group):
                return [self._replies[rank] for rank in range(self._size)]
            if self._lost is None and self._group != group:
                return RanksResizedError(f"all ranks were started anew, now {self._size} of them")
            return LearnerLostError(self._lost or "the ranks were ended")

    def ranks_lost(self) -> int:
        """Ranks that died or raised so far, without those that were only started anew with them."""
        return self._ranks_lost

    def close(self) -> None:
        """Ends the ranks, and with them `fit`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _over(self, group: int) -> bool:
        return self._closed or self._lost is not None or self._group != group


class _Watch(UserCallback):
    """Tells the conductor at once when ranks are lost; Ray Train calls it in its controller."""

    def __init__(self, conductor: Any) -> None:
        self._conductor = conductor

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        causes = {rank: getattr(error, "health_check_failure", error) for rank, error in worker_exceptions.items()}
        # Where a rank died, the others fail in the exchange that it does not come to.
        died = {rank: error for rank, error in causes.items() if isinstance(error, DEATHS)}
        (rank, error), *others = (died or causes).items()
        reason = f"rank {rank} {'died' if died else 'failed'}: {first_line(error)}"
        ray.get(self._conductor.lost.remote(reason, 1 + len(others)))
