"""Tasks that cannot be learned from: named and refused, or left out of their step and recorded."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from metadist import Callback, MetaTrainer
from metadist.algorithms import R2D2
from metadist.bad_episodes import BadEpisodes, read_bad_episodes
from metadist.cli import cli
from metadist.core.bad_episode import BadEpisode
from metadist.core.keys import TaskKey
from metadist.core.meta_gradient import MetaGradient
from metadist.core.plan import Plan, Range, plan_step
from metadist.distributed.adapter import Adapter
from metadist.errors import AdapterError, BadEpisodesError, EpisodeError, MetadistError, NonFiniteError
from metadist.experiment import make_experiment
from metadist.models import MLP
from metadist.replay import replay
from metadist.sections import CheckpointSettings, RunSettings, TrainingSettings
from tests.builders import tiny_config
from tests.poisoned import HUGE, NAN, NO_MEMORY, RAISES, Poisoned

TASKS = 11
BAD = {(1, 2): RAISES, (1, 3): HUGE, (1, 10): NAN, (3, 6): HUGE, (3, 7): NAN, (3, 8): RAISES}
"""Two of chunk 0 and 1 of step 1, one beside the task that fills its last chunk, and all of chunk 2 of step 3."""


def config_of(directory: Path, bad: dict = BAD, policy: str = "skip", share: float = 0.05, **training):
    fixed = {"steps": 6, "meta_batch_size": TASKS, "chunk_size": 3, "seed": 5, "compile": False}
    fixed |= {"on_bad_episode": policy, "max_bad_episodes": share}
    return tiny_config(
        task=Poisoned(bad),
        training=TrainingSettings(**fixed | training),
        run=RunSettings(
            name="run",
            storage_path=str(directory),
            log_every=1,
            checkpoint_config=CheckpointSettings(checkpoint_frequency=2),
        ),
    )


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_the_sums_are_those_of_the_good_tasks_and_say_how_many_are_missing(tmp_path, strategy):
    experiment = make_experiment(config_of(tmp_path, strategy=strategy))
    adapter, plan = Adapter(experiment), plan_step(5, 1, TASKS, 3)
    sums = adapter.sum_range(plan, Range(0, 4), experiment.initial_theta)
    # The good tasks one by one, out of a source without bad ones, added in float64.
    good = [key for chunk in range(4) for key in plan.keys(chunk) if key.task < TASKS and (1, key.task) not in BAD]
    assert len(good) == TASKS - 3
    alone = MetaGradient(experiment.algorithm, experiment.network, experiment.theta, strategy="loop", compile=False)
    theta, statistics = torch.from_numpy(experiment.initial_theta), torch.zeros(0)
    parts = [
        alone.sum_chunk(theta, statistics, Poisoned().sample([key]), np.ones(1, np.float32), [key]) for key in good
    ]
    expected = np.sum([part.gradient.astype(np.float64) for part in parts], axis=0)
    np.testing.assert_allclose(sums.gradient, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert sums.metrics[0] == pytest.approx(sum(float(part.metrics[0]) for part in parts), rel=1e-5)
    assert sums.left_out.tolist() == [3]
    found = adapter.take_receipt().bad_in_order()
    assert [(episode.chunk, episode.key.task, episode.source) for episode in found] == [
        (0, 2, "Poisoned"),
        (1, 3, "Poisoned"),
        (3, 10, "Poisoned"),
    ]
    reasons = [episode.reason for episode in found]
    assert reasons[0] == "sampling raised ZeroDivisionError: no such sinusoid"
    assert reasons[1].startswith("query loss is ")
    assert reasons[2].startswith("sampling raised EpisodeError: task source Poisoned: support set of task train/")


def test_a_machine_without_memory_says_nothing_about_a_task_and_leaves_nothing_behind(tmp_path):
    experiment = make_experiment(config_of(tmp_path, bad={(1, 2): RAISES, (1, 9): NO_MEMORY}))
    adapter = Adapter(experiment)
    with pytest.raises(MemoryError):
        adapter.sum_range(plan_step(5, 1, TASKS, 3), Range(0, 4), experiment.initial_theta)
    # Task 2 was found before, in a range that came to nothing: the next range does not tell of it.
    adapter.sum_range(plan_step(5, 0, TASKS, 3), Range(0, 4), experiment.initial_theta)
    assert adapter.take_receipt().bad == ()


def test_a_step_divides_by_the_tasks_that_are_left(tmp_path):
    # Three of 11 tasks of step 1 are bad: the step's loss is the mean over the other 8, as a replay gives them.
    config = config_of(tmp_path, steps=2)
    result = MetaTrainer(config).fit(evaluate=False)
    chunks = [replay(str(tmp_path / "run"), step=1, chunk=chunk, config=config) for chunk in range(4)]
    losses = [task.loss for chunk in chunks for task in chunk.tasks if task.bad is None]
    assert len(losses) == TASKS - 3
    assert result.train["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_every_way_through_a_run_records_each_bad_episode_once_with_equal_bits(tmp_path):
    class Stops(Callback):
        def on_step(self, step, metrics, status):
            if step == 4:
                raise RuntimeError("pulled the plug")

    whole = MetaTrainer(config_of(tmp_path / "whole")).fit(evaluate=False)
    with pytest.raises(RuntimeError, match="pulled the plug"):
        MetaTrainer(config_of(tmp_path / "cut"), callbacks=[Stops()]).fit(evaluate=False)
    # Step 3's were recorded, and no checkpoint is behind them: they are found again.
    resumed = MetaTrainer(config_of(tmp_path / "cut")).fit(evaluate=False)
    assert (resumed.theta_sha256, resumed.optimizer_sha256) == (whole.theta_sha256, whole.optimizer_sha256)
    recorded = (tmp_path / "whole/run/bad_episodes.jsonl").read_text()
    assert (tmp_path / "cut/run/bad_episodes.jsonl").read_text() == recorded
    lines = [json.loads(line) for line in recorded.splitlines()]
    assert [(line["step"], line["chunk"], line["task"]) for line in lines] == [
        (step, task // 3, f"train/seed=5/step={step}/task={task}") for step, task in BAD
    ]
    assert {tuple(line) for line in lines} == {("step", "chunk", "task", "source", "reason")}


def test_a_run_without_bad_episodes_has_no_such_file_and_the_bits_of_one_that_raises(tmp_path):
    bits = [
        MetaTrainer(config_of(tmp_path / policy, bad={}, policy=policy)).fit(evaluate=False).theta_sha256
        for policy in ("raise", "skip")
    ]
    assert bits[0] == bits[1]
    assert not list(tmp_path.rglob("bad_episodes.jsonl"))


def test_a_run_that_a_bad_episode_ended_goes_on_without_it(tmp_path):
    with pytest.raises(MetadistError):
        MetaTrainer(config_of(tmp_path / "ended", bad={(3, 6): HUGE}, policy="raise")).fit(evaluate=False)
    ended = MetaTrainer(config_of(tmp_path / "ended", bad={(3, 6): HUGE})).fit(evaluate=False)
    never = MetaTrainer(config_of(tmp_path / "never", bad={(3, 6): HUGE})).fit(evaluate=False)
    assert ended.theta_sha256 == never.theta_sha256


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        (
            RAISES,
            AdapterError,
            r"task source Poisoned raised ZeroDivisionError: no such sinusoid \(.*poisoned.py, line",
        ),
        (NAN, EpisodeError, r"task source Poisoned: support set of task .* holds NaN"),
    ],
)
def test_an_episode_that_cannot_be_sampled_ends_the_run_and_is_named(tmp_path, what, error, message):
    with pytest.raises(error, match=r"^step 1, chunk 2, task train/seed=5/step=1/task=7: " + message):
        MetaTrainer(config_of(tmp_path, bad={(1, 7): what}, policy="raise")).fit(evaluate=False)


def test_an_infinite_loss_ends_the_run_and_is_named(tmp_path):
    message = (
        r"^step 1, chunk 2, task source Poisoned, task train/seed=5/step=1/task=7: query loss is (inf|nan)\. Lower"
        r" algorithm\.inner_lr .* left out with training\.on_bad_episode: skip\.$"
    )
    with pytest.raises(NonFiniteError, match=message):
        MetaTrainer(config_of(tmp_path, bad={(1, 7): HUGE}, policy="raise")).fit(evaluate=False)


def test_a_task_whose_adapting_raises_is_left_out_too(tmp_path):
    class Refuses(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x):
            if x.max() > 4.9:
                raise KeyError("too far out")
            return self.layer(x)

    config = dataclasses.replace(config_of(tmp_path, bad={}, share=1.0, strategy="loop"), model=Refuses())
    MetaTrainer(config).fit(evaluate=False)
    found = read_bad_episodes(tmp_path / "run")
    assert {line["reason"] for line in found} == {"adapting raised KeyError: 'too far out'"}
    source = Poisoned()
    for step in range(6):
        batch = source.sample([TaskKey(5, "train", step, task) for task in range(TASKS)])
        far = [task for task in range(TASKS) if max(float(part.x[task].max()) for part in batch) > 4.9]
        assert [line["task"].rpartition("=")[2] for line in found if line["step"] == step] == list(map(str, far))


def test_a_step_without_a_good_task_ends_the_run(tmp_path):
    bad = {(2, task): RAISES for task in range(TASKS)}
    with pytest.raises(AdapterError, match=r"^step 2: all of its 11 tasks are bad"):
        MetaTrainer(config_of(tmp_path, bad=bad, share=1.0)).fit(evaluate=False)


def bad_episodes(directory, share, first_step=0):
    training = TrainingSettings(meta_batch_size=10, on_bad_episode="skip", max_bad_episodes=share)
    return BadEpisodes(directory, first_step, training)


def found_at(step, count=1):
    plan = Plan(0, "train", step, 10, 5)
    return plan, [BadEpisode(TaskKey(0, "train", step, task), 0, "Poisoned", "it is bad") for task in range(count)]


def test_too_many_of_the_last_hundred_steps_end_the_run_with_the_last_one(tmp_path):
    # 0.01 of the 1,000 tasks of 100 steps: ten may be bad, and an eleventh may not.
    record = bad_episodes(tmp_path, 0.01)
    for step in range(0, 100, 10):
        record.add(*found_at(step))
    # Step 0 is no longer among the last hundred, so at step 100 there are ten again.
    record.add(*found_at(100))
    with pytest.raises(
        BadEpisodesError, match=r"^step 101, chunk 0, task train/seed=0/step=101/task=0, task source"
    ) as e:
        record.add(*found_at(101))
    assert "11 tasks of the last 100 steps are bad, more than training.max_bad_episodes = 0.01" in str(e.value)


def test_the_share_counts_what_was_found_before_a_resume(tmp_path):
    record = bad_episodes(tmp_path, 0.01)
    record.add(*found_at(3, count=8))
    record.add(*found_at(7, count=2))
    record.close()
    resumed = bad_episodes(tmp_path, 0.01, first_step=7)
    assert resumed.count == 8
    resumed.add(*found_at(7, count=2))
    assert resumed.count == 10
    with pytest.raises(BadEpisodesError):
        resumed.add(*found_at(8))


def test_no_share_at_all_ends_the_run_at_the_first(tmp_path):
    with pytest.raises(BadEpisodesError):
        bad_episodes(tmp_path, 0.0).add(*found_at(0))


def test_closed_form_heads_leave_bad_tasks_out_as_well(tmp_path):
    config = dataclasses.replace(config_of(tmp_path), model=MLP(hidden=(6,)), algorithm=R2D2())
    MetaTrainer(config).fit(evaluate=False)
    assert len(read_bad_episodes(tmp_path / "run")) == len(BAD)


def test_replay_gives_each_task_of_the_chunk_at_the_runs_own_theta(tmp_path):
    config = config_of(tmp_path, bad={(3, 6): HUGE, (3, 8): RAISES})
    MetaTrainer(config).fit(evaluate=False)
    found = replay(str(tmp_path / "run"), step=3, chunk=2, config=config)
    assert (found.from_step, found.steps_replayed, found.source) == (2, 1, "Poisoned")
    assert [task.task for task in found.tasks] == [f"train/seed=5/step=3/task={task}" for task in (6, 7, 8)]
    assert found.tasks[0].bad.startswith("query loss is ")
    assert found.tasks[1].bad is None
    assert found.tasks[2].bad == "ZeroDivisionError: no such sinusoid"
    # The same from the start, without the checkpoint in between.
    for saved in (tmp_path / "run/checkpoints").iterdir():
        (saved / "manifest.json").unlink()
    again = replay(str(tmp_path / "run"), step=3, chunk=2, config=config)
    assert (again.from_step, again.tasks) == (0, found.tasks)


def test_replay_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(
        "task: {name: sinusoid}\nmodel: {name: mlp, hidden: [5]}\nalgorithm: {name: maml}\n"
        "training: {steps: 4, meta_batch_size: 6, chunk_size: 4, compile: false}\nscaling: {num_workers: 0}\n"
    )

    def metadist(*arguments):
        outcome = CliRunner().invoke(cli, arguments)
        return outcome.exit_code, outcome.stdout, outcome.stderr

    assert metadist("train", "c.yaml", "--no-evaluate")[0] == 0
    status, said, progress = metadist("replay", "runs/c", "--step", "3", "--chunk", "1", "--json")
    assert status == 0
    value = json.loads(said)
    assert [task["task"] for task in value["tasks"]] == [f"train/seed=0/step=3/task={task}" for task in (4, 5)]
    assert all(task["gradient_norm"] > 0 and task["bad"] is None for task in value["tasks"])
    assert "Repeating the steps 0 to 2" in progress
    assert "and 3 steps" in metadist("replay", "runs/c", "--step", "3", "--chunk", "1")[1]
    for arguments, message in (
        (("--step", "4", "--chunk", "0"), "--step must be below the run's training.steps = 4, got 4"),
        (("--step", "0", "--chunk", "2"), "--chunk must be below 2, the run's chunks a step, got 2"),
        (("--step", "0", "--chunk", "0", "--pdb", "--json"), "--pdb and --json cannot go together"),
    ):
        status, said, errors = metadist("replay", "runs/c", *arguments)
        assert (status, said) == (2, "")
        assert message in errors


def test_replay_opens_the_debugger_where_a_task_raises(tmp_path, monkeypatch):
    config = config_of(tmp_path, bad={(0, 1): RAISES})
    MetaTrainer(config).fit(evaluate=False)
    frames = []
    monkeypatch.setattr("metadist.replay.pdb.post_mortem", lambda trace: frames.append(trace))
    replay(str(tmp_path / "run"), step=0, chunk=0, config=config, debug=True)
    last = frames[0]
    while last.tb_next:
        last = last.tb_next
    assert last.tb_frame.f_code.co_filename.endswith("poisoned.py")
