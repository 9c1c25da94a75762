"""Promise 1, for each moment of the learner's work in which its process can be killed."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from metadist import Callback
from metadist.callbacks import Fault, Status
from metadist.core.plan import Plan, Range
from metadist.distributed.actors import LearnerActor
from metadist.training import Result
from tests.distributed.test_same_bits import bits, fit, sinusoid

Moment = Literal["before_a_step", "in_a_step", "after_a_step", "in_a_checkpoint"]
STEP = 6
"""Steps before the one that is disturbed. Checkpoints are made after 5 and 10."""
DONE: dict[Moment, tuple[int, int]] = {
    "before_a_step": (STEP, STEP),
    # Theta and the optimizer's moments are new, and nobody has heard of it.
    "in_a_step": (STEP, STEP + 1),
    "after_a_step": (STEP + 1, STEP + 1),
    "in_a_checkpoint": (10, 10),
}
"""Steps that a learner counts, and updates that its optimizer counts, when it is killed."""
WAIT_S = 120
pytestmark = pytest.mark.ray


def killed_learner(moment: Moment, folder: Path) -> type[LearnerActor]:
    """The learner's actor, but the first in `folder` that comes to `moment` kills its process.

    The class is local to this function: Ray then pickles it whole, and not by its name.
    """

    class KilledLearner(LearnerActor):
        def step(self, plan: Plan, spans: list[Range], sums: list[Any]) -> Any:
            if plan.step != STEP:
                return super().step(plan, spans, sums)
            if moment == "before_a_step":
                self.die()
            if moment == "in_a_step":
                loop = self.learner._loop
                update = loop._update
                loop._update = lambda gradient: (update(gradient), self.die())
            answer = super().step(plan, spans, sums)
            if moment == "after_a_step":
                threading.Thread(target=self.die_when_accepted, daemon=True).start()
            return answer

        def state(self) -> Any:
            state = super().state()
            if moment == "in_a_checkpoint" and state.step > STEP:
                self.die()
            return state

        def die_when_accepted(self) -> None:
            while not (folder / "accepted").exists():
                time.sleep(0.01)
            self.die()

        def die(self) -> None:
            updates = int(self.learner._loop.optimizer_tensors()["step"])
            try:
                with (folder / "killed").open("x") as file:
                    json.dump({"pid": os.getpid(), "done": [self.learner._step, updates]}, file)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    return KilledLearner


class Driver(Callback):
    """Keeps the faults that it is told. A learner that is to die after the disturbed step does so in `on_step`."""

    def __init__(self, moment: Moment, folder: Path) -> None:
        self._moment, self._folder = moment, folder
        self.told: list[tuple[int, str, str]] = []

    def on_fault(self, step: int, fault: Fault, text: str) -> None:
        self.told.append((step, fault, text.partition(". ")[2]))

    def on_step(self, step: int, metrics: dict[str, float], status: Status) -> None:
        if self._moment == "after_a_step" and step == STEP + 1:
            (self._folder / "accepted").touch()
            deadline = time.monotonic() + WAIT_S
            while not self._is_dead():
                assert time.monotonic() < deadline, "the learner did not die in time"
                time.sleep(0.01)

    def _is_dead(self) -> bool:
        place = self._folder / "killed"
        last_words = place.read_text() if place.exists() else ""
        return bool(last_words) and not Path(f"/proc/{json.loads(last_words)['pid']}").exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return fit(sinusoid(tmp_path_factory.mktemp("undisturbed")), 0, "undisturbed")


@pytest.mark.parametrize("moment", DONE)
def test_a_learner_killed_in_any_moment_costs_the_steps_since_the_last_checkpoint_and_no_bit(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Result, moment: Moment
) -> None:
    monkeypatch.setattr("metadist.distributed.remote_learner.LearnerActor", killed_learner(moment, tmp_path))
    driver = Driver(moment, tmp_path)
    disturbed = fit(sinusoid(tmp_path), 1, "disturbed", driver)
    assert tuple(json.loads((tmp_path / "killed").read_text())["done"]) == DONE[moment]
    # Accepted by the driver were as many steps as the learner had ended.
    assert driver.told == [(DONE[moment][0], "learner_lost", "Going on from step 5.")]
    assert disturbed.adapters_lost == 0
    assert bits(disturbed) == bits(undisturbed)
