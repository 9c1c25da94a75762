"""What a sweep shows while it runs, and what TensorBoard's HParams reads of its trials."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from metadist.run_directory import RunDirectory
from metadist.sweeps.directory import SweepDirectory
from metadist.sweeps.file import load_sweep
from metadist.sweeps.sweep import Sweep
from metadist.tuning.progress import SweepProgress

CONFIGS = Path(__file__).parents[1] / "configs"
NUMBERS = {"a": 0, "b": 1, "c": 2}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"""\
base: {CONFIGS / "sinusoid_maml.yaml"}
space:
  algorithm.inner_optimizer: choice(sgd, momentum)
  algorithm.inner_momentum: uniform(0.5, 0.9) if algorithm.inner_optimizer == momentum
objective: {{metric: loss}}
budget: {{trials: 3, steps: 40, every: 20}}
run: {{storage_path: {tmp_path}, name: out}}
"""
    )
    return load_sweep(path)


@pytest.fixture
def directory(sweep: Sweep) -> SweepDirectory:
    """With trial 0 in its midst, 1 at its end, and 2 not told of."""
    found = SweepDirectory(sweep)
    found.open(resume=False)
    found.begin(0, {"algorithm.inner_optimizer": "sgd"})
    found.begin(1, {"algorithm.inner_optimizer": "momentum", "algorithm.inner_momentum": 0.75})
    found.begin(2, {"algorithm.inner_optimizer": "sgd"})
    told = [{"step": 20, "loss": 0.5}, {"step": 40, "loss": 0.25}]
    RunDirectory(str(found.trial(0))).write_json("reports.json", told[:1])
    RunDirectory(str(found.trial(1))).write_json("reports.json", told)
    return found


def trial(name: str, status: str, step: int) -> SimpleNamespace:
    return SimpleNamespace(trial_id=name, status=status, last_result={"step": step})


def shown(progress: SweepProgress) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(progress.table())
    return console.file.getvalue()


def test_the_table_has_the_trials_that_go_on_and_then_those_that_ended(sweep, directory) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    trials = [trial("a", "RUNNING", 20), trial("b", "RUNNING", 40), trial("c", "PENDING", 0)]
    with SweepProgress(sweep, directory, NUMBERS, terminal) as progress:
        progress.on_trial_start(0, trials, trials[0])
        progress.on_trial_result(1, trials, trials[0], {"step": 20, "loss": 0.5})
        progress.on_trial_result(2, trials, trials[1], {"step": 40, "loss": 0.25})
        before = shown(progress)
        progress.on_trial_complete(3, trials, trials[1])
        after = shown(progress)
    assert "0 of 3 trials ended  60 steps" in before
    assert "1 of 3 trials ended  60 steps" in after
    assert "best loss 0.2500" in after
    rows = [line.replace("│", " ").split() for line in after.splitlines() if "│" in line]
    assert rows == [
        ["0", "running", "20", "0.5000", "sgd"],
        ["2", "waiting", "0", "sgd"],
        ["1", "finished", "40", "0.2500", "momentum", "0.75"],
    ]
    # It was shown in the terminal too.
    assert "trials ended" in terminal.file.getvalue()


def test_without_a_terminal_each_end_is_a_line(sweep, directory) -> None:
    console = Console(file=io.StringIO(), width=120)
    with SweepProgress(sweep, directory, NUMBERS, console) as progress:
        progress.on_trial_result(0, [], trial("b", "RUNNING", 40), {"step": 40, "loss": 0.25})
        progress.on_trial_complete(1, [], trial("b", "RUNNING", 40))
        progress.on_trial_complete(2, [], trial("a", "RUNNING", 20))
    assert [line[:40] for line in console.file.getvalue().splitlines()] == [
        "trial 1  finished at step 40  loss 0.250",
        "trial 0  stopped at step 20  loss 0.5000",
    ]


def test_tensorboard_reads_settings_and_metric_of_a_trial_once(sweep, directory) -> None:
    console = Console(quiet=True)
    for _ in range(2):  # As in a sweep that is resumed.
        with SweepProgress(sweep, directory, NUMBERS, console) as progress:
            progress.on_trial_complete(1, [], trial("b", "RUNNING", 40))
    events = list((directory.trial(1) / "tensorboard").glob("events*"))
    assert len(events) == 1
    found = EventAccumulator(str(events[0]))
    found.Reload()

    def data(tag: str) -> HParamsPluginData:
        return HParamsPluginData.FromString(found.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content)

    hparams = data("session_start_info").session_start_info.hparams
    assert hparams["algorithm.inner_optimizer"].string_value == "momentum"
    assert hparams["algorithm.inner_momentum"].number_value == 0.75
    assert [info.name.tag for info in data("experiment").experiment.metric_infos] == ["val/loss"]
