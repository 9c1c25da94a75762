"""The learner as the driver sees it: an actor beside it, asked for one thing at a time, replaced where it is lost."""

import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from metadist.core.outer import OuterSettings
from metadist.core.plan import Plan, Range
from metadist.distributed import kept_actors
from metadist.distributed.actors import LearnerActor
from metadist.distributed.learner import LearnerState
from metadist.distributed.pace import FACTOR
from metadist.distributed.placement import learner_options
from metadist.errors import AdapterError, LearnerLostError, MetadistError, first_line
from metadist.sections import ScalingSettings


class RemoteLearner:
    """One learner's actor. What asks it raises LearnerLostError where it has died or hangs, and its own errors."""

    def __init__(
        self, experiment: list[ray.ObjectRef], outer: OuterSettings, num_steps: int, scaling: ScalingSettings
    ) -> None:
        self._arguments = (experiment, outer, num_steps)
        self._scaling = scaling
        self._longest_s: float | None = None
        self.actor: Any = None
        self._lag = outer.lag
        self.newest: ray.ObjectRef
        """Theta and the running statistics, after the last step that was accepted."""
        self.published: ray.ObjectRef
        """Those at which the next step's meta-gradients are taken: the newest, or with a lag those before."""

    def replace(self, state: LearnerState | None) -> None:
        """Starts another actor, from `state`, in place of the one that was there."""
        self.close()
        self.actor = kept_actors.take(LearnerActor)
        if self.actor is None:
            self.actor = ray.remote(LearnerActor).options(**learner_options(self._scaling)).remote()
        self._longest_s = None
        self.published, self.newest = self.actor.prepare.options(num_returns=2).remote(*self._arguments, state)
        self.ask(self.newest)

    def step(self, plan: Plan, sums: dict[Range, ray.ObjectRef]) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        """Begins an outer step: where its report will be, to be asked for, and where its newest theta."""
        report, newest = self.actor.step.options(num_returns=2).remote(plan, list(sums), list(sums.values()))
        return report, newest

    def published_after(self, newest: ray.ObjectRef) -> ray.ObjectRef:
        """What will be published once a step is accepted whose theta is `newest`."""
        return self.newest if self._lag else newest

    def accept(self, newest: ray.ObjectRef) -> None:
        """The step is done whose theta is `newest`."""
        self.published, self.newest = self.published_after(newest), newest

    def state(self) -> LearnerState:
        """A copy of all that it holds."""
        state: LearnerState = self.ask(self.actor.state.remote())
        return state

    def ask(self, call: ray.ObjectRef) -> Any:
        """The answer to a call.

        Its own errors are raised as they are. It is lost where it dies, and is ended where it is silent for
        scaling.hung_timeout_s longer than eight times its longest answer so far.
        """
        began = time.monotonic()
        usual_s = self._scaling.start_timeout_s if self._longest_s is None else FACTOR * self._longest_s
        try:
            answer = ray.get(call, timeout=usual_s + self._scaling.hung_timeout_s)
        except RayTaskError as error:
            raise cause_of(error) from None
        except GetTimeoutError:
            self.close()
            raise LearnerLostError(
                f"the learner was silent for {time.monotonic() - began:.0f} s, and was ended"
            ) from None
        except RayError as error:
            raise LearnerLostError(f"the learner was lost: {first_line(error)}") from None
        self._longest_s = max(self._longest_s or 0.0, time.monotonic() - began)
        return answer

    def close(self, is_idle: bool = False) -> None:
        """Ends the actor, if there is one; where it has nothing left to do, the next run may have it."""
        actor, self.actor = self.actor, None
        if actor is not None and is_idle:
            kept_actors.leave(LearnerActor, actor, self._scaling)
        elif actor is not None:
            ray.kill(actor)


def cause_of(error: RayTaskError) -> Exception:
    """The error as it was raised in the actor, if it is one of ours."""
    if isinstance(error.cause, MetadistError):
        return error.cause
    return AdapterError(f"an actor failed: {first_line(error)}") if error.cause is None else error.cause
