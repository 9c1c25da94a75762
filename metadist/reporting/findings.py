"""Everything that a report tells of one run, as numbers: what was written down, and what its checkpoint gives again."""

import dataclasses
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from metadist.config import Config
from metadist.core.threads import torch_threads
from metadist.errors import CheckpointError, DataError, ModelError, NonFiniteError, RunDirectoryError
from metadist.evaluation import load_run_config, load_state
from metadist.experiment import Experiment, check_splits, make_experiment
from metadist.reporting.adaptation import Adaptation, adapt_to_episodes
from metadist.reporting.curves import Curves, curves_of
from metadist.reporting.explanation import Explanation, explain_one
from metadist.reporting.gradients import Alignment, alignment
from metadist.reporting.rates import LearnedRates, learned_rates
from metadist.reporting.record import Record, read_record
from metadist.run_directory import RunDirectory

MISSING_DATA = (DataError, ModelError)
"""What makes a run impossible to build again here, though its record can still be told."""

SHOWN = 3
"""So many of the hardest and of the easiest episodes are shown."""


@dataclass(frozen=True)
class Findings:
    """A run's record, and what was computed from its checkpoint: None where that could not be."""

    record: Record
    step: int | None = None
    """Of the checkpoint."""
    experiment: Experiment | None = field(default=None, repr=False)
    config: Config | None = field(default=None, repr=False)
    adaptation: Adaptation | None = None
    alignment: Alignment | None = None
    rates: LearnedRates | None = None
    explanation: Explanation | None = None
    shown: list[int] = field(default_factory=list)
    """Numbers of the episodes that are shown: the hardest first, then the easiest."""
    curves: list[Curves] = field(default_factory=list)
    """Of those, in one-dimensional regression."""
    families: list[str | None] = field(default_factory=list)
    """Of each episode, where the task source has `family_of(key)`."""
    notes: list[str] = field(default_factory=list)
    """What is missing and why, in sentences."""


def find(directory: RunDirectory, episodes: int, step: int | None, config: Config | None, console: Console) -> Findings:
    """Reads the record and computes the rest on this machine's CPU. Raises MetadistError."""
    record = read_record(directory)
    if record.own_objects and config is None:
        return _recorded(
            record,
            f"Nothing was computed from the checkpoint: {' and '.join(record.own_objects)} of this run"
            f" {'was an object' if len(record.own_objects) == 1 else 'were objects'} of the program that made it."
            " In Python: metadist.report(run_dir, config=config).",
        )
    config = config or load_run_config(directory)
    config = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, use_gpu=False))
    if step is None and not directory.names("checkpoints"):
        return _recorded(record, "There is no checkpoint yet, so nothing was computed from one.")
    try:
        experiment = dataclasses.replace(make_experiment(config), compile=False)
        check_splits(experiment.source, config.evaluation.seed, [config.evaluation.split])
    except MISSING_DATA as error:
        return _recorded(record, f"Nothing was computed from the checkpoint: {error}")
    try:
        state = load_state(directory, experiment, step, console)
    except RunDirectoryError:
        if step is not None:
            raise
        return _recorded(record, "There is no finished checkpoint yet, so nothing was computed from one.")
    except CheckpointError as error:
        raise CheckpointError(f"{error} No report was written.") from None
    with torch_threads(experiment.threads):
        console.print(Text(f"adapting to {episodes} {config.evaluation.split} episodes"))
        adaptation = adapt_to_episodes(config, experiment, state, episodes)
        notes, aligned = [], None
        try:
            console.print(Text("comparing meta-gradients"))
            aligned = alignment(experiment, state)
        except NonFiniteError as error:
            notes.append(f"Meta-gradients could not be compared: {error}")
        order = adaptation.by_difficulty
        hardest = order[:SHOWN]
        shown = [*hardest, *[number for number in order[: -SHOWN - 1 : -1] if number not in hardest]]
        family_of = getattr(experiment.source, "family_of", None)
        return Findings(
            record=record,
            step=state.step,
            experiment=experiment,
            config=config,
            adaptation=adaptation,
            alignment=aligned,
            rates=learned_rates(experiment, state),
            explanation=explain_one(experiment, state, adaptation),
            shown=shown,
            curves=curves_of(config, experiment, state, adaptation, shown),
            families=[family_of(episode.key) for episode in adaptation.episodes] if family_of else [],
            notes=[*record.notes, *notes],
        )


def _recorded(record: Record, why: str) -> Findings:
    return Findings(record=record, notes=[why, *record.notes])
