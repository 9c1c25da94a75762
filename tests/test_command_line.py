"""The command line, as a newcomer uses it; its mistakes are in test_bad_input.py."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from metadist.cli import cli

CONFIG = str(Path(__file__).parents[1] / "configs/sinusoid_maml.yaml")
TRAIN_KEYS = {
    "run_dir",
    "step",
    "theta_sha256",
    "optimizer_sha256",
    "train",
    "evaluation",
    "tasks_per_second",
    "adapters_lost",
    "chunks_recomputed",
    "chunks_given_twice",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short sinusoid run with validation."""
    path = tmp_path_factory.mktemp("runs") / "short"
    overrides = ["training.steps=6", "evaluation.every=3", "evaluation.episodes=30", "evaluation.val_episodes=5"]
    sets = [part for override in [*overrides, "run.log_every=2"] for part in ("--set", override)]
    done = CliRunner().invoke(cli, ["train", CONFIG, *sets, "--workers", "0", "--run-dir", str(path)])
    assert done.exit_code == 0, done.output
    rows = [line.split("│")[1].strip() for line in done.stdout.splitlines() if line.startswith("│")]
    assert rows == ["0", "1", "5", "10"]
    assert f"picture        {path}/adapted_curves.png" in done.stdout.replace("\n", "")
    return path


def test_a_run_directory_holds_what_the_readme_says(run_dir: Path) -> None:
    expected = {"config.yaml", "fingerprint.json", "metrics.jsonl", "tensorboard", "checkpoints", "evaluation.json"}
    expected |= {"spec.json", "timeline.jsonl", "adapted_curves.png", "evaluation.png", "timeline.png", "training.png"}
    assert {path.name for path in run_dir.iterdir()} == expected
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], "val_loss" in line) for line in lines] == [(2, 0), (3, 1), (4, 0), (6, 0), (6, 1)]


def test_tensorboard_shows_the_metrics_of_the_file(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert shown == {line["step"]: pytest.approx(line["loss"]) for line in lines if "loss" in line}


def test_train_again_has_nothing_to_do_and_prints_one_json_object(run_dir: Path) -> None:
    overrides = ["--set", "training.steps=6", "--set", "evaluation.episodes=30"]
    arguments = ["train", CONFIG, *overrides, "--workers", "0", "--run-dir", str(run_dir), "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result.keys() == TRAIN_KEYS
    assert (result["step"], result["train"]) == (6, {})
    assert "Going on from step 6" in done.stderr


def test_evaluate_scores_every_inner_step_and_its_interval_shrinks_with_the_root_of_the_episodes(
    run_dir: Path,
) -> None:
    few, many = (evaluate(run_dir, "--episodes", number) for number in ("40", "640"))
    assert (many["split"], many["episodes"], many["batch_norm"], many["accuracy"]) == ("test", 640, "none", None)
    per_step = many["policies"][0]["per_inner_step"]
    assert [row["inner_step"] for row in per_step] == list(range(11))
    assert many["loss"] == per_step[10]["loss"]
    # Losses of sinusoids vary much from task to task, so the ratio is near 4, not 4.
    assert 2.5 < few["loss"]["ci95"] / many["loss"]["ci95"] < 6.5
    assert json.loads((run_dir / "evaluation.json").read_text()) == many


def test_the_same_seed_means_the_same_episodes_and_another_seed_others(run_dir: Path) -> None:
    first = evaluate(run_dir, "--episodes", "20")
    assert evaluate(run_dir, "--episodes", "20") == first
    assert evaluate(run_dir, "--episodes", "20", "--seed", "5")["loss"] != first["loss"]
    assert evaluate(run_dir, "--episodes", "20", "--split", "val")["loss"] != first["loss"]


def evaluate(run_dir: Path, *arguments: str) -> dict:
    done = CliRunner().invoke(cli, ["evaluate", str(run_dir), "--workers", "0", "--json", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_more_steps_may_be_asked_for_later_and_give_the_bits_of_one_long_run(tmp_path: Path) -> None:
    def train(run: str, steps: int) -> dict:
        sets = ["--set", f"training.steps={steps}", "--no-evaluate", "--workers", "0", "--json"]
        done = CliRunner().invoke(cli, ["train", CONFIG, *sets, "--run-dir", str(tmp_path / run)])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    train("in_two", 3)
    two, one = train("in_two", 7), train("in_one", 7)
    assert (two["theta_sha256"], two["optimizer_sha256"]) == (one["theta_sha256"], one["optimizer_sha256"])


def test_doctor_names_versions_and_devices_and_fails_for_a_token_that_others_can_read(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path)}
    environment.pop("RAY_ADDRESS", None)
    doctor = [sys.executable, "-m", "metadist", "doctor", "--json"]
    fine = subprocess.run(doctor, env=environment, capture_output=True, text=True)
    findings = {finding["name"]: finding for finding in json.loads(fine.stdout)["findings"]}
    assert {"Python", "torch", "ray", "CPU", "GPU", "shared memory", "disk", "Ray token"} <= findings.keys() | {"GPU"}
    assert findings["torch"]["status"] == "ok"
    without = environment | {"RAY_AUTH_MODE": "disabled"}
    unguarded = json.loads(subprocess.run(doctor, env=without, capture_output=True, text=True).stdout)["findings"]
    (finding,) = [f for f in unguarded if f["name"] == "Ray token"]
    assert (finding["status"], finding["found"].partition(":")[0]) == ("note", "RAY_AUTH_MODE is disabled")
    token = tmp_path / ".ray/auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    open_to_all = subprocess.run(doctor, env=environment, capture_output=True, text=True)
    assert open_to_all.returncode == 1
    (finding,) = [f for f in json.loads(open_to_all.stdout)["findings"] if f["name"] == "Ray token"]
    assert (finding["status"], finding["remedy"]) == ("wrong", f"chmod 600 {token}")
    assert "secret" not in open_to_all.stdout + open_to_all.stderr


def test_the_interval_is_1_96_sigma_over_root_n() -> None:
    import numpy as np

    from metadist.scores import mean_and_interval

    # 1, 2, 3, 4: mean 2.5, sample variance 5/3.
    score = mean_and_interval(np.array([1.0, 2.0, 3.0, 4.0], np.float32))
    assert score == {"mean": 2.5, "ci95": pytest.approx(1.96 * math.sqrt(5 / 3) / 2)}
    assert math.isnan(mean_and_interval(np.array([1.0]))["ci95"])
