"""Population-based training: trials that change their rates in mid-run, and take over each other's theta.

All of a generation train to the same step. There the worst take over theta and the optimizer of ones drawn from the
best (exploit), and go on with other rates than these had (explore). Tune's own schedulers of these names draw from the
interpreter's global generators, and act when the last trial comes in, while others are still being paused: they cannot
be resumed to the same decisions. Here every draw is keyed by the sweep's seed and the step, and nothing is decided
before all are paused, so that the same scores give the same population, whatever ran beside what.
"""

import math
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from rich.console import Console
from rich.text import Text

from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.lineage import rates_at_the_end
from metadist.sweeps.sweep import Sweep
from metadist.tuning.exploration import Bandit, Member, Perturbation


class Population(FIFOScheduler):
    """Synchronous generations (Jaderberg et al. 2017, appendix A.1). All trials must be there from the start."""

    def __init__(self, sweep: Sweep, directory: SweepDirectory, numbers: dict[str, int], console: Console) -> None:
        """`numbers` are the trials', by Tune's ids."""
        super().__init__()
        self._sweep, self._directory, self._numbers, self._console = sweep, directory, numbers, console
        self._explorer = (Bandit if sweep.scheduler.name == "pb2" else Perturbation)(sweep.space)
        self._every = sweep.scheduler.perturb_every or sweep.budget.every
        self._end = self._every
        """The step at which the generation under way ends."""
        self._arrived: dict[Trial, float] = {}
        """Scores of those that have come to it."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts, and what was decided lies in the trials' directories."""
        return {}

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """A trial that was paused tells again what it told before; that is left aside."""
        if result["step"] < self._end or self._end >= self._sweep.budget.steps:
            return TrialScheduler.CONTINUE
        sign = 1 if self._sweep.objective.mode == "max" else -1
        self._arrived[trial] = sign * result[self._sweep.objective.metric]
        return TrialScheduler.PAUSE

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        trials = [trial for trial in controller.get_trials() if not trial.is_finished()]
        are_here = bool(trials) and len(self._numbers) == self._sweep.num_trials
        if are_here and all(trial in self._arrived and trial.status == Trial.PAUSED for trial in trials):
            self._begin_generation(trials)
        open_ones = [trial for trial in trials if trial not in self._arrived]
        # Paused ones first: those that are pending have asked for their place already.
        for status in (Trial.PAUSED, Trial.PENDING):
            for trial in open_ones:
                if trial.status == status:
                    return trial
        return None

    def _begin_generation(self, trials: list[Trial]) -> None:
        step, self._end = self._end, self._end + self._every
        members = {trial: self._member(trial, step) for trial in trials}
        self._arrived.clear()
        self._explorer.note(step, list(members.values()))
        # The best first; equal ones by number.
        ranked = sorted(trials, key=lambda trial: (-members[trial].score, members[trial].number))
        count = min(math.ceil(len(ranked) * self._sweep.scheduler.quantile), len(ranked) // 2)
        best, worst = ranked[:count], ranked[len(ranked) - count :]
        random = np.random.Generator(np.random.Philox(key=[self._sweep.searcher.seed, step]))
        for trial in worst:
            source = members[best[int(random.integers(count))]]
            rates = self._explorer.explore(members[trial], source, random)
            overrides = self._directory.branch(members[trial].number, source.number, step, rates)
            shown = ", ".join(f"{key} {rate:.4g}" for key, rate in rates_at_the_end(overrides).items())
            self._console.print(
                Text(f"step {step}: trial {members[trial].number} goes on from trial {source.number} with {shown}")
            )
        for trial in trials:
            overrides = self._directory.overrides(members[trial].number, step + 1)
            trial.set_config({"base": self._sweep.base, **overrides})

    def _member(self, trial: Trial, step: int) -> Member:
        number = self._numbers[trial.trial_id]
        return Member(number, self._arrived[trial], rates_at_the_end(self._directory.overrides(number, step)))
