"""Feeding new tasks back: what is learned, what must not be forgotten, versions and the way back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from metadist import MetaTrainer, load, update
from metadist.algorithms import MAML, ProtoNet, Transfer
from metadist.cli import cli
from metadist.core.keys import TaskKey
from metadist.core.outer import OuterSettings
from metadist.errors import CheckpointError, RunDirectoryError
from metadist.models import MLP
from metadist.run_directory import RunDirectory
from metadist.sections import EvaluationSettings, RunSettings, TrainingSettings
from metadist.tasks import FewShot, PooledClasses, Sinusoid
from metadist.tasks.class_pool import PoolRow, write_pool
from metadist.tasks.few_shot import FewShotSource
from metadist.tasks.own_tasks import MixedSource, OwnTask, OwnTaskSource, fitted_source, sha256_of
from metadist.updating import roll_back
from tests.builders import tiny_config

OLD, NEW = slice(0, 2), slice(2, 4)
"""Features in which old and new classes differ; in the others there is noise alone."""


def examples(where, classes, number, seed):
    """`[classes, number, 4]`: class centres lie far apart in the features `where`, and in the others there is noise."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(classes, number, 4)) * 0.5
    x[..., where] = random.normal(size=(classes, 1, 2)) * 3 + random.normal(size=(classes, number, 2)) * 0.3
    return x.astype(np.float32)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "old.parquet"
    rows = [
        PoolRow(f"{split}{number}", None, split, features=x.tolist())
        for seed, split in enumerate(("train", "val", "test"))
        for number, of_class in enumerate(examples(OLD, 20, 8, seed))
        for x in of_class
    ]
    write_pool(rows, path)
    return str(path)


def trained(directory, task, algorithm, steps=60, **training) -> str:
    config = tiny_config(
        task=task,
        model=MLP(hidden=(16,)),
        algorithm=algorithm,
        outer=OuterSettings(lr=0.01),
        training=TrainingSettings(
            **{"steps": steps, "meta_batch_size": 8, "chunk_size": 4, "compile": False, **training}
        ),
        evaluation=EvaluationSettings(episodes=2),
        run=RunSettings(name="run", storage_path=str(directory)),
    )
    return MetaTrainer(config).fit(evaluate=False).run_dir


def few_shot(pool, **sizes):
    return FewShot(**{"pool": pool, "ways": 5, "shots": 1, "queries": 3, **sizes})


@pytest.fixture(scope="module")
def original(pool, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("original"), few_shot(pool), ProtoNet(), steps=20)


@pytest.fixture
def run(original, tmp_path):
    return str(shutil.copytree(original, tmp_path / "run"))


def write_tasks(place: Path, number: int, where=NEW, classes=5, each=6) -> str:
    place.mkdir()
    for task in range(number):
        rows = [
            {"class": f"{task}/{label}", "features": x.tolist()}
            for label, of_class in enumerate(examples(where, classes, each, 100 + task))
            for x in of_class
        ]
        pq.write_table(pa.Table.from_pylist(rows), place / f"task_{task}.parquet")
    return str(place)


def accuracy_on(run_dir: str, where) -> float:
    """Of 40 tasks of ten classes each, never seen by anybody; one example of each to adapt to."""
    run = load(run_dir)
    scores = []
    for seed in range(40):
        x = examples(where, 10, 6, 10_000 + seed)
        labels = np.arange(10)
        model = run.adapt(x[:, 0], labels, cross_validation=False)
        scores.append(model.score(x[:, 1:].reshape(-1, 4), labels.repeat(5)))
    return float(np.mean(scores))


def test_new_tasks_are_learned_and_old_ones_kept(pool, tmp_path) -> None:
    run = trained(tmp_path / "runs", few_shot(pool, ways=10), ProtoNet(), steps=100)
    tasks = write_tasks(tmp_path / "tasks", 12)
    new, old = accuracy_on(run, NEW), accuracy_on(run, OLD)
    result = update(run, tasks, steps=60, lr=0.01, margin=0.018)
    assert result.accepted
    assert result.version == 1
    assert result.own_after["mean"] > result.own_before["mean"] + 0.1
    assert accuracy_on(run, NEW) > new + 0.2
    assert accuracy_on(run, OLD) > old - 0.03
    # Without old tasks beside them these are forgotten, and that is noticed.
    roll_back(run)
    alone = update(run, tasks, steps=60, lr=0.01, share=1.0, margin=0.018)
    assert not alone.accepted
    assert alone.version == 0


def test_the_same_update_has_the_same_bits_and_going_back_restores_those_of_before(run, tmp_path) -> None:
    tasks = write_tasks(tmp_path / "tasks", 3)
    before = load(run).theta
    first = update(run, tasks, margin=0.9)
    updated = load(run)
    assert first.accepted
    assert not torch.equal(updated.theta, before)
    assert updated.step == 20 + first.steps
    assert first.steps == 3  # Four rounds of three tasks, half of eight a step.
    assert roll_back(run) == 0
    assert torch.equal(load(run).theta, before)
    assert load(run).step == 20
    again = update(run, tasks, margin=0.9)
    assert again.version == 2
    assert again.parent == 0
    assert again.theta_sha256 == first.theta_sha256
    assert again.old_after == first.old_after
    third = update(run, tasks, margin=0.9)
    assert (third.version, third.parent) == (3, 2)
    assert third.theta_sha256 != again.theta_sha256
    assert roll_back(run) == 2
    assert roll_back(run, to=1) == 1
    assert torch.equal(load(run).theta, updated.theta)


def test_an_update_that_old_tasks_suffer_from_leaves_no_trace(run, tmp_path) -> None:
    tasks = write_tasks(tmp_path / "tasks", 2)
    before = load(run).theta
    arguments = ["update", run, "--tasks", tasks, "--lr", "3", "--steps", "5", "--margin", "0"]
    found = CliRunner().invoke(cli, arguments)
    assert found.exit_code == 1
    assert "not accepted, version 0 stays in use" in found.stdout
    assert not (Path(run) / "versions").exists()
    assert torch.equal(load(run).theta, before)
    shown = CliRunner().invoke(cli, [*arguments, "--json"])
    assert shown.exit_code == 1
    assert json.loads(shown.stdout)["accepted"] is False


def test_training_goes_on_from_its_own_checkpoint_and_says_that_the_version_is_behind(pool, run, tmp_path) -> None:
    update(run, write_tasks(tmp_path / "tasks", 2), margin=0.9)
    longer = trained(tmp_path, few_shot(pool), ProtoNet(), steps=25)
    undisturbed = trained(tmp_path / "other", few_shot(pool), ProtoNet(), steps=25)
    assert longer == run
    found = CliRunner().invoke(cli, ["evaluate", run, "--episodes", "2", "--workers", "0"])
    assert found.exit_code == 0
    assert "from step 20 to 25 since" in found.stderr
    assert roll_back(run, to=0) == 0
    assert torch.equal(load(run).theta, load(undisturbed).theta)


def test_the_commands_say_which_version_they_use(run, tmp_path) -> None:
    update(run, write_tasks(tmp_path / "tasks", 2), margin=0.9)
    found = CliRunner().invoke(cli, ["evaluate", run, "--episodes", "2", "--workers", "0"])
    assert "version 1 of" in found.stderr
    assert "updated with 2 tasks" in found.stderr
    back = CliRunner().invoke(cli, ["update", run, "--rollback"])
    assert back.exit_code == 0
    assert back.stdout == f"version 0 of {run} is in use\n"
    assert "version" not in CliRunner().invoke(cli, ["evaluate", run, "--episodes", "2", "--workers", "0"]).stderr


def test_regression_runs_are_updated_too(tmp_path) -> None:
    task = Sinusoid(shots=4, queries=4)
    run = trained(tmp_path / "runs", task, MAML(inner_lr=0.01, inner_steps=1), steps=3)
    place = tmp_path / "tasks"
    place.mkdir()
    for number in range(2):
        x = np.linspace(-5, 5, 10)
        columns = {"x": x, "target": np.sin(x + number) + 4}
        pq.write_table(pa.table(columns), place / f"curve_{number}.parquet")
    result = update(run, str(place), margin=0.9, steps=20, lr=0.01)
    assert result.score == "loss"
    assert result.accepted
    assert result.own_after["mean"] < result.own_before["mean"]


def test_an_altered_version_is_refused(run, tmp_path) -> None:
    update(run, write_tasks(tmp_path / "tasks", 2), margin=0.9)
    (theta,) = Path(run).glob("versions/0001/*/theta.safetensors")
    content = bytearray(theta.read_bytes())
    content[-1] ^= 1
    theta.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"theta\.safetensors has not the SHA-256"):
        load(run)


@pytest.mark.parametrize("content", ['{"version": 7}', '{"version": "x"}', "[]", '{"ver'])
def test_a_damaged_pointer_is_refused_and_can_be_set_anew(run, tmp_path, content) -> None:
    RunDirectory(run).make("versions")
    (Path(run) / "versions" / "current.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=r"current\.json"):
        load(run)
    assert CliRunner().invoke(cli, ["update", run, "--rollback", "0"]).exit_code == 0
    load(run)


def own(name, classes, each, seed=0):
    x = np.arange(classes * each * 4, dtype=np.float32).reshape(-1, 4) + 1000 * (seed + 1)
    return OwnTask(name, x, np.repeat([f"{name}{number}" for number in range(classes)], each))


def test_an_episode_of_an_own_task_is_drawn_from_it_alone(pool) -> None:
    source = few_shot(pool, train_queries=2).open()
    task = own("a", classes=7, each=4)
    episode = OwnTaskSource([task], source).episode(TaskKey(0, "train", 3, 1), 5)
    for part, number in ((episode.support, 1), (episode.query, 2)):
        assert part.y.tolist() == np.repeat(range(5), number).tolist()
    drawn = torch.cat([episode.support.x, episode.query.x])[:, 0].numpy()
    rows = ((drawn - task.x[0, 0]) / 4).astype(int)
    assert len(set(rows)) == 15, "an example was drawn twice"
    labels = torch.cat([episode.support.y, episode.query.y]).tolist()
    assert len({(label, task.y[row]) for label, row in zip(labels, rows, strict=True)}) == 5


def test_a_task_with_few_classes_is_filled_up_with_old_ones(pool) -> None:
    source = few_shot(pool).open()
    key = TaskKey(0, "train", 3, 1)
    episode = OwnTaskSource([own("a", classes=2, each=9)], source).episode(key, 0)
    old = source.sample([key])
    for part, was in ((episode.support, old.support), (episode.query, old.query)):
        mine = part.y < 2
        assert (part.x[mine][:, 0] >= 1000).all()
        torch.testing.assert_close(part.x[~mine], was.x[0][was.y[0] >= 2], rtol=0, atol=0)
        assert part.y.tolist() == was.y[0].tolist()


def test_own_tasks_take_their_turns_and_their_share(pool) -> None:
    source = few_shot(pool).open()
    tasks = [own("a", 5, 4), own("b", 5, 4, seed=1)]
    mixed = MixedSource(OwnTaskSource(tasks, source), meta_batch_size=3, share=0.5)
    keys = [TaskKey(0, "train", step, task) for step in range(4) for task in range(3)]
    first = mixed.sample(keys).support.x[:, :, 0]
    kinds = ["old" if row.max() < 900 else "a" if row.max() < 1900 else "b" for row in first]
    assert kinds == ["old", "a", "old", "b"] * 3
    untouched = [TaskKey(0, "val", 0, task) for task in range(3)]
    assert torch.equal(mixed.sample(untouched).query.x, source.sample(untouched).query.x)
    assert torch.equal(mixed.sample(keys[:1]).query.x, source.sample(keys[:1]).query.x)


def test_fewer_queries_are_asked_for_where_classes_are_small(pool) -> None:
    source = few_shot(pool).open()
    assert fitted_source(source, [own("a", 5, 9)]) is source
    fitted = fitted_source(source, [own("a", 5, 9), own("b", 5, 2)])
    assert isinstance(fitted, FewShotSource)
    assert fitted.train_spec.query_size == 5
    assert fitted.train_spec.support_size == 5
    assert fitted.spec == source.spec


def test_the_digest_tells_every_change_of_a_task() -> None:
    task = own("a", 2, 2)
    changed = [
        [OwnTask("b", task.x, task.y)],
        [OwnTask("a", task.x + 1, task.y)],
        [OwnTask("a", task.x, task.y[::-1])],
        [OwnTask("a", task.x.reshape(2, 8), task.y)],
        [task, task],
    ]
    assert len({sha256_of(tasks) for tasks in [[task], *changed]}) == 6


def write_csv(place: Path, text: str) -> None:
    place.mkdir()
    (place / "task.csv").write_text("class,a,b,c,d\n" + text)


@pytest.mark.parametrize(
    ("prepare", "options", "said"),
    [
        (lambda p: None, [], "no such directory"),
        (lambda p: p.mkdir(), [], "holds no tasks"),
        (lambda p: write_csv(p, "x,1,2,3,4\nx,1,2,3,4\n"), [], "has 1 class, and 2 or more"),
        (lambda p: write_csv(p, "x,1,2,3,4\ny,1,2,3,4\ny,1,2,3,4\n"), [], "class 'x' has 1 examples"),
        (lambda p: write_tasks(p, 1), ["--steps", "0"], "0 is not in the range"),
        (lambda p: write_tasks(p, 1), ["--lr", "-1"], "lr must be above 0"),
        (lambda p: write_tasks(p, 1), ["--lr", "nan"], "lr must be above 0"),
        (lambda p: write_tasks(p, 1), ["--share", "0"], "share must be above 0"),
        (lambda p: write_tasks(p, 1), ["--margin", "100"], "margin must be 0 or more"),
        (lambda p: write_tasks(p, 1), ["--rollback"], "either --tasks DIR"),
        (lambda p: write_tasks(p, 1), ["--invert"], "only images have negatives"),
    ],
)
def test_wrong_tasks_and_options_are_refused(run, tmp_path, prepare, options, said) -> None:
    prepare(tmp_path / "tasks")
    found = CliRunner().invoke(cli, ["update", run, "--tasks", str(tmp_path / "tasks"), *options])
    assert found.exit_code == 2, found.output
    assert said in found.stderr
    assert not (Path(run) / "versions").exists()


def test_going_back_is_refused_where_there_is_nothing_to_go_back_to(run, tmp_path) -> None:
    for arguments, said in (
        ([run, "--rollback"], "there is none before it"),
        ([run, "--rollback", "4"], "has no version 4; it has 0"),
        ([str(tmp_path / "nothing"), "--rollback"], "is no run directory"),
        ([run], "either --tasks DIR"),
    ):
        found = CliRunner().invoke(cli, ["update", *arguments])
        assert found.exit_code == 2, found.output
        assert said in found.stderr


def test_an_algorithm_that_has_no_training_tasks_is_refused(pool, tmp_path) -> None:
    task = PooledClasses(pool=pool, ways=5, shots=1, queries=3)
    run = trained(tmp_path / "runs", task, Transfer(), steps=2)
    found = CliRunner().invoke(cli, ["update", run, "--tasks", write_tasks(tmp_path / "tasks", 1)])
    assert found.exit_code == 2
    assert "trains on mini-batches" in found.stderr
