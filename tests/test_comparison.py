"""Comparing runs on the same episodes: pairing, what is refused, the command line, and no bit by the adapters."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

import metadist
from metadist.cli import cli
from metadist.core.calibration import BINS
from metadist.errors import UserError
from metadist.paired import ComparedRun, Comparison
from metadist.scores import Evaluation, PolicyScores
from metadist.tasks.class_pool import PoolRow, write_pool

CONFIG = """\
task: {{name: {task}, pool: {pool}, ways: 3, shots: 2, queries: 3{more}}}
model: {{name: mlp, hidden: [8]}}
algorithm: {{name: maml, inner_lr: {inner_lr}, inner_steps: 2}}
training: {{steps: {steps}, meta_batch_size: 4, chunk_size: 2}}
evaluation: {{episodes: 12}}
scaling: {{num_workers: 0}}
run: {{storage_path: {place}}}
"""


class Place:
    """A directory with a class pool of vectors around class means, and configs over it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pool("pool", seed=0)

    def pool(self, name: str, seed: int) -> None:
        random = np.random.default_rng(seed)
        rows = []
        for split in ("train", "val", "test"):
            for number in range(5):
                mean = random.normal(size=6)
                for _ in range(6):
                    features = list(mean + 0.7 * random.normal(size=6))
                    rows.append(PoolRow(f"{split}{number}", None, split, features=features))
        write_pool(rows, self.path / f"{name}.parquet")

    def config(self, name: str, inner_lr: float = 0.1, steps: int = 3, more: str = "", pool: str = "pool") -> str:
        text = CONFIG.format(
            task="few_shot",
            pool=self.path / f"{pool}.parquet",
            more=more,
            inner_lr=inner_lr,
            steps=steps,
            place=self.path / "runs",
        )
        (self.path / f"{name}.yaml").write_text(text)
        return str(self.path / f"{name}.yaml")

    def run(self, name: str) -> str:
        return str(self.path / "runs" / name)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def compare(*arguments: str) -> dict:
    done = CliRunner().invoke(cli, ["compare", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def run_of(name: str, accuracy: np.ndarray, policy: str = "none") -> ComparedRun:
    """Per-episode accuracies after 0 and 1 inner steps; the losses are twice as large."""
    scores = PolicyScores.of(policy, 2 * accuracy, accuracy, np.ones((len(accuracy), 2, 3, BINS), np.float32))
    return ComparedRun(name, name, "maml", Evaluation("test", len(accuracy), 0, 7, [scores]))


def test_a_difference_is_the_mean_of_the_episodes_differences_with_their_own_interval() -> None:
    # Scores vary by .3 from episode to episode, and the second run is better by .02 +- .01 in each.
    random = np.random.default_rng(3)
    first = random.normal(0.5, 0.3, (50, 2)).astype(np.float32)
    second = (first + random.normal(0.02, 0.01, (50, 2))).astype(np.float32)
    comparison = Comparison([run_of("a", first), run_of("b", second)])
    differences = second[:, -1].astype(float) - first[:, -1].astype(float)
    mean = sum(differences) / 50
    deviation = (sum((value - mean) ** 2 for value in differences) / 49) ** 0.5
    found = comparison.difference(comparison.runs[1])
    assert found == {"mean": pytest.approx(mean), "ci95": pytest.approx(1.96 * deviation / 50**0.5)}
    assert comparison.excludes_zero(comparison.runs[1])
    # Unpaired, the difference would be lost in the spread between episodes.
    assert comparison.score_of(comparison.runs[0])["ci95"] > 10 * found["ci95"]


def test_a_run_differs_from_itself_by_exactly_nothing_and_one_episode_proves_nothing() -> None:
    accuracy = np.random.default_rng(0).random((9, 2)).astype(np.float32)
    same = Comparison([run_of("a", accuracy), run_of("a", accuracy)])
    assert same.difference(same.runs[1]) == {"mean": 0.0, "ci95": 0.0}
    assert not same.excludes_zero(same.runs[1])
    single = Comparison([run_of("a", accuracy[:1]), run_of("b", accuracy[:1] + 1)])
    assert not single.excludes_zero(single.runs[1])
    assert single.as_dict()["runs"][1]["difference"] == {"mean": 1.0, "ci95": None, "interval_excludes_0": False}


def test_the_table_marks_what_differs_says_what_that_means_and_names_unlike_conditions() -> None:
    accuracy = np.random.default_rng(0).random((30, 2)).astype(np.float32)
    noise = np.random.default_rng(1).normal(0, 0.2, accuracy.shape).astype(np.float32)
    runs = [
        run_of("first", accuracy, "transductive"),
        run_of("better", accuracy + 0.25, "transductive"),
        run_of("about_equal", accuracy + noise - noise.mean(0), "support"),
    ]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(Comparison(runs).table())
    text = captured.get()
    (better,) = [line for line in text.splitlines() if line.startswith(" better")]
    (equal,) = [line for line in text.splitlines() if line.startswith(" about_equal")]
    assert "+25.00 ± 0.00 *" in better
    assert "*" not in equal
    assert "2 intervals, each by itself: not corrected" in text
    assert "transductive batch norm" in text
    with console.capture() as captured:
        console.print(Comparison(runs[:2]).table())
    assert "not corrected" not in captured.get()
    assert "Under transductive" not in captured.get()


def test_configs_are_trained_once_and_then_taken_as_they_are(place: Place) -> None:
    slow, fast = place.config("slow", inner_lr=0.01), place.config("fast", inner_lr=0.5)
    done = CliRunner().invoke(cli, ["compare", slow, fast, "--json", "--episodes", "20"])
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout)
    assert done.stderr.count("Training ") == 2
    rows = first["runs"]
    assert [(row["name"], row["algorithm"], row["step"]) for row in rows] == [("slow", "maml", 3), ("fast", "maml", 3)]
    assert first["episodes"] == 20
    assert rows[0]["difference"] is None
    assert rows[1]["difference"]["mean"] == pytest.approx(rows[1]["accuracy"]["mean"] - rows[0]["accuracy"]["mean"])
    before = {file: file.read_bytes() for file in place.path.glob("runs/*/checkpoints/*/*")}
    again = CliRunner().invoke(cli, ["compare", slow, place.run("fast"), "--json", "--episodes", "20"])
    assert json.loads(again.stdout) == first
    assert "Training " not in again.stderr
    assert {file: file.read_bytes() for file in place.path.glob("runs/*/checkpoints/*/*")} == before
    further = compare(slow, place.run("fast"), "--set", "training.steps=5")
    assert [row["step"] for row in further["runs"]] == [5, 3]


def test_every_run_has_the_scores_of_its_own_evaluation(place: Place) -> None:
    paths = [place.config("slow", inner_lr=0.01), place.config("fast", inner_lr=0.5)]
    found = compare(*paths, "--seed", "4", "--split", "val", "--episodes", "15")
    for name, row in zip(("slow", "fast"), found["runs"], strict=True):
        alone = metadist.evaluate(place.run(name), seed=4, split="val", episodes=15).as_dict()
        assert [row[key] for key in ("accuracy", "loss", "ece")] == [alone[key] for key in ("accuracy", "loss", "ece")]
    # The run's own settings of evaluation are not those of a comparison.
    assert metadist.evaluate(place.run("slow")).episodes == 12


def test_training_only_settings_may_differ_and_a_copy_of_the_pool_is_the_same_one(place: Place) -> None:
    place.pool("copy", seed=0)
    ours = place.config("ours")
    others = [place.config("others", more=", train_shots: 1, train_queries: 2", pool="copy")]
    assert [row["step"] for row in compare(ours, *others)["runs"]] == [3, 3]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"more": ", rotate_classes: false", "pool": "another"}, "task.pool: "),
        ({"override": "task.shots=1"}, "task.shots: 2 there, 1 here"),
        ({"override": "task.ways=2"}, "task.ways: 3 there, 2 here"),
        ({"override": "task.queries=1"}, "task.queries: 3 there, 1 here"),
    ],
)
def test_other_episodes_are_refused_before_anything_is_trained(place: Place, settings: dict, message: str) -> None:
    place.pool("another", seed=1)
    override = settings.pop("override", None)
    first = metadist.load_config(place.config("first"))
    other = metadist.load_config(place.config("other", **settings), [override] if override else [])
    with pytest.raises(UserError, match="has other episodes than") as refused:
        metadist.compare([first, other])
    assert message in str(refused.value)
    assert not (place.path / "runs").exists()


def test_task_sources_of_a_program_are_told_apart_by_their_episodes(tmp_path: Path) -> None:
    class Lines:
        spec = metadist.EpisodeSpec(kind="regression", input_shape=(1,), output_size=1, support_size=2, query_size=3)

        def __init__(self, slope: float) -> None:
            self.slope = slope

        def sample(self, keys):
            import torch

            u = torch.tensor(np.stack([metadist.generator(key).random(5) for key in keys]), dtype=torch.float32)
            x, y = u[..., None], self.slope * u[..., None]
            examples = metadist.Examples
            return metadist.EpisodeBatch(examples(x[:, :2], y[:, :2]), examples(x[:, 2:], y[:, 2:]))

    def config(name: str, slope: float) -> metadist.Config:
        from tests.builders import tiny_config

        run = metadist.RunSettings(name=name, storage_path=str(tmp_path))
        evaluation = metadist.EvaluationSettings(episodes=5)
        return dataclasses.replace(tiny_config(task=Lines(slope)), run=run, evaluation=evaluation)

    found = metadist.compare([config("a", 1.0), config("b", 1.0)])
    assert found.score == "loss"
    # Equal settings and seeds: equal bits.
    assert found.difference(found.runs[1]) == {"mean": 0.0, "ci95": 0.0}
    with pytest.raises(UserError, match="their settings are equal, their data are not"):
        metadist.compare([config("a", 1.0), config("c", 2.0)])


def test_two_configs_for_one_run_directory_are_refused(place: Place) -> None:
    one, two = place.config("one"), place.config("two", inner_lr=0.2)
    done = CliRunner().invoke(cli, ["compare", one, two, "--set", "run.name=x"])
    assert done.exit_code == 2
    assert f"{one} and {two} would both be trained into {place.run('x')}" in done.stderr
    assert not (place.path / "runs").exists()


@pytest.mark.pictures
def test_out_writes_the_object_and_a_picture_beside_it(place: Place) -> None:
    out = place.path / "results" / "both.json"
    arguments = [place.config("a"), place.config("b", inner_lr=0.3), "--out", str(out)]
    done = CliRunner().invoke(cli, ["compare", *arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text()) == compare(*arguments)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(out.with_suffix(".png")) in done.stdout.replace("\n", "")


@pytest.mark.pictures
def test_shots_evaluates_each_size_as_a_run_of_that_size_would_be(place: Place) -> None:
    config = place.config("x")
    assert CliRunner().invoke(cli, ["train", config, "--no-evaluate"]).exit_code == 0
    done = CliRunner().invoke(cli, ["evaluate", place.run("x"), "--shots", "3,1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["shots"] for row in found["shots"]] == [1, 3]
    for row in found["shots"]:
        task = metadist.load_config(config, [f"task.shots={row['shots']}"])
        alone = metadist.evaluate(place.run("x"), config=task).as_dict()
        assert row["policies"][0] == {key: alone[key] for key in ("batch_norm", "loss", "accuracy", "ece")}
    directory = Path(place.run("x"))
    assert json.loads((directory / "evaluation_shots.json").read_text()) == found
    assert (directory / "accuracy_against_shots.png").read_bytes().startswith(b"\x89PNG")
    told = CliRunner().invoke(cli, ["evaluate", place.run("x"), "--shots", "3,1"])
    rows = [line.split("│")[1].strip() for line in told.stdout.splitlines() if line.startswith("│")]
    assert rows == ["1", "3"]


def test_shots_of_a_task_without_them_and_of_training_episodes_with_their_own_are_refused(place: Place) -> None:
    path = place.config("x", more=", train_shots: 1")
    assert CliRunner().invoke(cli, ["train", path, "--no-evaluate"]).exit_code == 0
    with pytest.raises(UserError, match=r"'train' have task.train_shots = 1 instead. Use --split val or test"):
        metadist.evaluate_shots(place.run("x"), [1, 2], split="train")
    config = dataclasses.replace(metadist.load_config(path), task=object())
    with pytest.raises(UserError, match="task object has no setting `shots` that could be changed"):
        metadist.evaluate_shots(place.run("x"), [1, 2], config=config)
    with pytest.raises(UserError, match=r"at least 1, got \[0, 2\]"):
        metadist.evaluate_shots(place.run("x"), [0, 2])


@pytest.mark.pictures
def test_a_classifiers_evaluation_tells_its_calibration(place: Place) -> None:
    assert CliRunner().invoke(cli, ["train", place.config("x")]).exit_code == 0
    told = CliRunner().invoke(cli, ["evaluate", place.run("x")])
    found = json.loads((Path(place.run("x")) / "evaluation.json").read_text())
    calibration = found["policies"][0]["calibration"]
    # 12 episodes of 3 ways and 3 queries.
    assert sum(part["count"] for part in calibration["bins"]) == 12 * 9
    assert found["ece"] == calibration["ece"] == found["policies"][0]["per_inner_step"][-1]["ece"]
    gaps = [part["count"] * abs(part["accuracy"] - part["confidence"]) for part in calibration["bins"] if part["count"]]
    assert found["ece"] == pytest.approx(sum(gaps) / (12 * 9))
    assert f"expected calibration error after 2 inner steps: {100 * found['ece']:.2f} %" in told.stdout
    assert (Path(place.run("x")) / "reliability.png").read_bytes().startswith(b"\x89PNG")
