"""Sweeps on Ray Tune: many meta-trainings at once, each inside its own placement group.

The state of a scheduler or a searcher is never saved. A trial's reports are, and everything else follows from
them: a resumed sweep begins again, its trials tell what they told before without computing it, and the decisions
fall as they fell.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray import tune as ray_tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.search import Searcher
from rich.console import Console
from rich.text import Text

from metadist.config import config_from_document
from metadist.config_file import dump_yaml, parse_document, read_document
from metadist.distributed.cluster import alive_nodes, connect, may_grow
from metadist.distributed.placement import Node, resources_per_adapter, room_for
from metadist.errors import ClusterError, ConfigError, InterruptedRun
from metadist.experiment import open_task
from metadist.reporting.sweep_page import write_sweep_report
from metadist.run_directory import RunDirectory
from metadist.sections import ScalingSettings
from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.file import load_sweep
from metadist.sweeps.finals import Finals, run_finals
from metadist.sweeps.suggestions import Suggestions, make_suggestions
from metadist.sweeps.sweep import Sweep
from metadist.sweeps.trial import TrialFailedError, read_reports, run_trial
from metadist.tuning.population import Population
from metadist.tuning.progress import SweepProgress


def trainable(config: dict[str, Any]) -> None:
    """A function trainable for `tune.Tuner`: meta-trains and reports `step`, `loss` and `accuracy` of each validation.

    `config` holds `base`, the path of a config file (or its content), and values for any of its keys
    (`algorithm.inner_lr`). Checkpoints lie in the config's run directory, by default one of the trial's own name
    under `run.storage_path`; a trial that is begun again goes on from there. Give it room with
    `tune.with_resources(trainable, trial_resources(scaling))`: its adapters live in the trial's placement group. A
    trial that diverges is no error, which Tune would try again: its last result has the reason under `failed`.
    """
    base = config["base"]
    document = read_document(base) if isinstance(base, str) else parse_document(dump_yaml(base), "base config")
    for key, value in config.items():
        if key != "base":
            document.override(f"{key}={json.dumps(value)}")
    settings = config_from_document(document)
    run, scaling = settings.run, settings.scaling
    name = run.name or ray_tune.get_context().get_trial_name()
    settings = dataclasses.replace(
        settings,
        run=dataclasses.replace(run, name=name),
        # Spread or packed is the placement group, by `trial_resources`. Actors that ask for SPREAD leave it.
        scaling=dataclasses.replace(
            scaling, num_workers=scaling.worker_limits[0], address=None, placement_strategy="PACK"
        ),
    )
    try:
        run_trial(settings, ray_tune.report)
    except TrialFailedError as error:
        last = (read_reports(RunDirectory(settings.run_directory)) or [{"step": 0}])[-1]
        nothing = {"loss": math.nan, "accuracy": math.nan}
        ray_tune.report(nothing | last | {"failed": str(error), "done": True})


def trial_resources(scaling: ScalingSettings) -> ray_tune.PlacementGroupFactory:
    """What one trial reserves, all or nothing: the least number of adapters, or one process without adapters."""
    adapters = scaling.worker_limits[0]
    if adapters == 0:
        return ray_tune.PlacementGroupFactory([{"CPU": float(scaling.threads_per_worker)}])
    # The process that leads the trial waits while its adapters compute, so it takes no CPU from them.
    return ray_tune.PlacementGroupFactory(
        [{}] + [resources_per_adapter(scaling)] * adapters, strategy=scaling.placement_strategy
    )


def tune(
    sweep: Sweep | str | Path,
    *,
    resume: bool = False,
    address: str | None = None,
    console: Console | None = None,
) -> ray_tune.ResultGrid:
    """Runs a sweep to its end and writes results.parquet, best.yaml and report.html into the sweep directory.

    With `resume` a sweep that was ended in its midst goes on: no trial computes a step again that its checkpoints
    have. Raises UserError where the input is wrong, where the directory holds another sweep, or where a single
    trial is larger than the cluster.
    """
    sweep = sweep if isinstance(sweep, Sweep) else load_sweep(sweep)
    console = console or Console(stderr=True)
    suggestions = make_suggestions(sweep)
    directory = SweepDirectory(sweep)
    numbers: dict[str, int] = {}
    scheduler = make_scheduler(sweep, directory, numbers, console)
    waits = sweep.scheduler.begins_all_at_once
    config = sweep.config({})
    scaling = config.scaling
    if scaling.backend == "train":
        raise ConfigError(
            "scaling.backend must be actors in a sweep, got train: a trial's placement group does not hold the ranks of"
            " Ray Train. Put `scaling.backend: actors` under overrides."
        )
    if scaling.label_selector:
        raise ConfigError(
            f"scaling.label_selector is not for sweeps, got {scaling.label_selector}: a trial's placement group chooses"
            " the nodes. Put `scaling.label_selector: {}` under overrides, and give nodes a resource of their own."
        )
    if scaling.learner_gpus:
        raise ConfigError(
            f"scaling.learner_gpus must be 0 in a sweep, got {scaling.learner_gpus:g}: the learner is beside its"
            " trial's process, outside the placement group. Put `scaling.learner_gpus: 0` under overrides."
        )
    if sweep.objective.metric == "accuracy" and open_task(config.task).spec.kind == "regression":
        raise ConfigError("objective.metric must be loss for a regression task, got accuracy. Write metric: loss.")
    with ExitStack() as stack:
        stack.callback(connect(ScalingSettings(num_workers=0, address=address or scaling.address), console))
        wanted = min(sweep.budget.max_concurrent or sweep.num_trials, sweep.num_trials)
        at_once = trials_at_once(scaling, wanted, list(alive_nodes().values()), may_grow)
        directory.open(resume)
        console.print(Text(f"{sweep.num_trials} trials, {at_once} at once, into {directory.path}"))
        # Relative paths in a config mean what they mean to `metadist train`.
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        # Tune's own table would go to stdout, which holds our result alone.
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
        # What killed a trial's process is in its line, not a traceback for each time that it was begun again.
        os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
        # How many trials Tune asks for before those that it has are running: "auto" is the number at once.
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(sweep.num_trials) if waits else "auto"
        progress = stack.enter_context(SweepProgress(sweep, directory, numbers, console))
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trainable, trial_resources(scaling)),
            tune_config=ray_tune.TuneConfig(
                metric=sweep.objective.metric,
                mode=sweep.objective.mode,
                search_alg=_Search(sweep, suggestions, directory, numbers),
                scheduler=scheduler,
                num_samples=sweep.num_trials,
                max_concurrent_trials=None if waits else at_once,
                reuse_actors=True,
            ),
            run_config=ray_tune.RunConfig(
                storage_path=str(directory.path.resolve()),
                name=directory.new_attempt(),
                failure_config=ray_tune.FailureConfig(max_failures=sweep.budget.max_failures),
                callbacks=[progress],
                verbose=0,
            ),
        )
        results = tuner.fit()
    directory.write_results()
    write_sweep_report(str(directory.path))
    ended = [row for row in directory.rows() if row["outcome"] != "unfinished"]
    if len(ended) < sweep.num_trials:
        raise InterruptedRun(f"Interrupted after {len(ended)} of {sweep.num_trials} trials. Go on with --resume.")
    return results


def train_finals(sweep: Sweep, *, address: str | None = None, console: Console | None = None) -> Finals | None:
    """Trains the best settings of an ended sweep, and its base config, anew, and scores them on the test tasks.

    Each training has the adapters of all trials that ran at once. None where the sweep asks for no finals. Raises
    UserError as `tune` does.
    """
    if not sweep.final.candidates:
        return None
    console = console or Console(stderr=True)
    scaling = sweep.config({}).scaling
    scaling = dataclasses.replace(scaling, address=address or scaling.address)
    with ExitStack() as stack:
        if least := scaling.worker_limits[0]:
            stack.callback(connect(dataclasses.replace(scaling, num_workers=least), console))
            room = trials_at_once(scaling, sweep.num_trials, list(alive_nodes().values()), may_grow)
            scaling = dataclasses.replace(scaling, num_workers=(least, least * room))
        return run_finals(sweep, SweepDirectory(sweep), scaling, console)


def trials_at_once(scaling: ScalingSettings, wanted: int, nodes: Sequence[Node], may_grow: Callable[[], bool]) -> int:
    """How many trials of those that are wanted run at once: as many as there is room for, all where nodes may come.

    `may_grow` is asked only where not even one has room, on the nodes that are there. Raises ClusterError, with the
    arithmetic, where none may come either.
    """
    adapters = scaling.worker_limits[0]
    each = resources_per_adapter(scaling) if adapters else {"CPU": float(scaling.threads_per_worker)}
    each = {name: amount for name, amount in each.items() if amount > 0}
    room = room_for(each, nodes)
    trials = room // max(1, adapters)
    if trials == 0 and may_grow():
        return wanted
    if trials == 0:
        one = ", ".join(f"{name} {amount:g}" for name, amount in each.items())
        has = ", ".join(f"{name} {sum(node.resources.get(name, 0) for node in nodes):g}" for name in each)
        what = f"{adapters} adapters of {one} each" if adapters else f"{one} (scaling.threads_per_worker)"
        raise ClusterError(
            f"scaling.num_workers: one trial needs {what}, and the whole cluster has {has} on {len(nodes)}"
            f" node{'s' if len(nodes) != 1 else ''}: room for {room}. Lower scaling.num_workers or"
            " scaling.resources_per_worker under overrides, or join a larger cluster with --address."
        )
    return min(trials, wanted)


def make_scheduler(
    sweep: Sweep, directory: SweepDirectory, numbers: dict[str, int], console: Console
) -> TrialScheduler:
    """Tune's own schedulers, their time the outer steps, and ours for populations."""
    scheduler, budget = sweep.scheduler, sweep.budget
    grace = scheduler.grace_steps or budget.every
    if scheduler.name == "asha":
        return ASHAScheduler(
            time_attr="step", max_t=budget.steps, grace_period=grace, reduction_factor=scheduler.reduction_factor
        )
    if scheduler.name == "hyperband":
        rounds = max(1, budget.steps // grace)
        return _HyperBand(grace, time_attr="rounds", max_t=rounds, reduction_factor=scheduler.reduction_factor)
    if scheduler.name == "median":
        return _MedianStopping(time_attr="step", grace_period=grace)
    if scheduler.changes_rates:
        return Population(sweep, directory, numbers, console)
    return FIFOScheduler()


class _MedianStopping(MedianStoppingRule):
    """Tune's, which pauses trials: one that goes on tells what it told before, and that counts once."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._told: dict[Any, int] = {}

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["step"] <= self._told.get(trial, 0):
            return TrialScheduler.CONTINUE
        self._told[trial] = result["step"]
        action: str = super().on_trial_result(controller, trial, result)
        return action


class _HyperBand(HyperBandScheduler):
    """Tune's, in rounds of `grace` steps: its shortest bracket otherwise begins with a single step."""

    def __init__(self, grace: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._grace = grace

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        rounds = result["step"] / self._grace
        action: str = super().on_trial_result(controller, trial, result | {"rounds": rounds})
        return action


class _Search(Searcher):
    """Gives the trials their numbers, points and run directories, in an order that does not depend on Ray."""

    def __init__(
        self, sweep: Sweep, suggestions: Suggestions, directory: SweepDirectory, numbers: dict[str, int]
    ) -> None:
        """`numbers`, the trials' by Tune's ids, are written here and read by others."""
        super().__init__(metric=sweep.objective.metric, mode=sweep.objective.mode)
        self._sweep, self._suggestions, self._directory, self._numbers = sweep, suggestions, directory, numbers

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        number = len(self._numbers)
        if number >= self._sweep.num_trials:
            return None
        self._numbers[trial_id] = number
        point = self._suggestions.ask(number, self._directory.point(number))
        self._directory.begin(number, point)
        return {"base": self._sweep.base, **self._directory.overrides(number, step=1)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        value = None if error or not result else result.get(self._sweep.objective.metric)
        if result and "failed" in result:
            value = -math.inf if self._sweep.objective.mode == "max" else math.inf
        self._suggestions.tell(self._numbers[trial_id], value)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts, and what was suggested lies in the trials' directories."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep is resumed by `metadist tune --resume`")
