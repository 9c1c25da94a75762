"""MLflow and W&B are told what metrics.jsonl tells, in one run of theirs however often ours is resumed."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from metadist import MetaTrainer
from metadist.errors import UserError
from metadist.sections import EvaluationSettings, RunSettings, TrainingSettings
from metadist.tracking import read_metrics
from metadist.training import Result
from tests.builders import tiny_config

HEADER = struct.Struct("<IHB")
"""Checksum, length and kind of a piece of a record."""
BLOCK, FULL, LAST = 2**15, 1, 4


def fit(directory: Path, tracker: str, steps: int) -> Result:
    run = RunSettings(name="run", storage_path=str(directory), log_every=2, trackers=(tracker,))
    evaluation = EvaluationSettings(episodes=4, every=3, val_episodes=4)
    training = TrainingSettings(steps=steps, meta_batch_size=11, chunk_size=3, seed=5, compile=False)
    return MetaTrainer(tiny_config(run=run, evaluation=evaluation, training=training)).fit()


def expected(result: Result, group: str, name: str) -> dict[int, float]:
    """A metric by step, as metrics.jsonl has it."""
    key = f"val_{name}" if group == "val" else name
    return {line["step"]: line[key] for line in read_metrics(Path(result.run_dir)) if key in line}


def test_mlflow_has_the_numbers_and_the_config_of_a_run_that_was_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    # A store of files: quicker to make than a database.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "sinusoids")
    fit(tmp_path, "mlflow", 4)
    result = fit(tmp_path, "mlflow", 6)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("sinusoids").experiment_id])
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["algorithm.inner_lr"] == "0.05"
    assert found.data.params["run_dir"] == result.run_dir

    def logged(name: str) -> dict[int, float]:
        return {metric.step: metric.value for metric in client.get_metric_history(found.info.run_id, name)}

    assert logged("train/loss") == expected(result, "train", "loss")
    assert logged("val/loss") == expected(result, "val", "loss")
    assert logged("test/loss")[6] == result.evaluation.as_dict()["loss"]["mean"]
    assert "train/accuracy" not in found.data.metrics  # A regression has none.


def test_wandb_has_the_numbers_offline_in_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = fit(tmp_path, "wandb", 6)
    (file,) = Path(result.run_dir).glob("wandb/offline-run-*/*.wandb")
    assert json.loads((tmp_path / "run/trackers.json").read_text())["wandb"] in file.name
    history = history_in(file)
    losses = {row["step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert losses == expected(result, "train", "loss")
    assert [row["test/loss"] for row in history if "test/loss" in row] == [result.evaluation.as_dict()["loss"]["mean"]]


def history_in(file: Path) -> list[dict[str, Any]]:
    """What was logged, out of W&B's own file: records of protobuf in LevelDB's log format, after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record, rows = file.read_bytes(), 7, b"", []
    while position + HEADER.size <= len(content):
        if BLOCK - position % BLOCK < HEADER.size:
            position += BLOCK - position % BLOCK
            continue
        _, size, kind = HEADER.unpack_from(content, position)
        record += content[position + HEADER.size : position + HEADER.size + size]
        position += HEADER.size + size
        if kind in (FULL, LAST):
            found, record = Record.FromString(record), b""
            if found.WhichOneof("record_type") == "history":
                items = found.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "metadist.trackers.mlflow_tracker", raising=False)
    with pytest.raises(
        UserError, match=r"run\.trackers: mlflow cannot be imported .* pip install 'metadist\[mlflow\]'"
    ):
        fit(tmp_path, "mlflow", 2)
    assert not (tmp_path / "run/metrics.jsonl").exists()
