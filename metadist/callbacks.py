"""What a run tells while it goes on, for loggers and for whoever wants to watch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from metadist.distributed.seconds import Seconds

if TYPE_CHECKING:
    from metadist.config import Config

Fault = Literal["adapter_lost", "learner_lost", "bad_episodes"]


@dataclass(frozen=True)
class Status:
    """How a run stands after a step; counts are of this call of `fit`."""

    num_adapters: int
    adapters_lost: int
    chunks_recomputed: int
    tasks_per_second: float
    """Mean since the start of this call."""
    seconds: Seconds
    """Where the time of the last step went."""
    peak_device_bytes: int = 0
    """The most GPU memory that the tensors of one adapter have taken; 0 on CPUs."""
    chunks_given_twice: int = 0
    """To another adapter too, since the first was late with them."""


class Callback:
    """To be derived from: every method does nothing until it is overridden.

    Methods are called by the process that called `fit`, one at a time, between steps, which wait for
    them. What one raises ends the run; its checkpoints stay.
    """

    awaits_checkpoints: ClassVar[bool] = False
    """Whether `on_checkpoint` is called when the checkpoint is on disk; training waits for that."""

    def on_start(self, config: "Config", run_dir: str, step: int) -> None:
        """Training is about to go on from `step` steps; 0 in a new run."""

    def on_step(self, step: int, metrics: dict[str, float], status: Status) -> None:
        """`step` steps are done, the last with these metrics: `loss`, `accuracy` (NaN in regression), and others."""

    def on_evaluation(self, step: int, split: str, scores: dict[str, float]) -> None:
        """Mean `loss` and `accuracy` after adaptation on the episodes of a split."""

    def on_checkpoint(self, step: int) -> None:
        """A checkpoint is being written; training goes on meanwhile, unless `awaits_checkpoints` is set."""

    def on_fault(self, step: int, fault: Fault, text: str) -> None:
        """Something was lost after `step` steps and is being made good, or left out of the last of them."""

    def on_end(self, step: int) -> None:
        """The run is over or interrupted, with `step` steps done; called also when an error ends it."""
