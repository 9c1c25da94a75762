"""`metadist serve`: many clients, wrong requests, a killed replica; and what is refused before anything starts."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi", reason="needs the extra `serve`")

from benchmarks.serving import REFUSALS, Request, make_requests, process_of, send, storm, told
from metadist import MetaTrainer, load
from metadist.algorithms import ProtoNet
from metadist.cli import cli
from metadist.models import MLP
from metadist.sections import EvaluationSettings, RunSettings, TrainingSettings
from metadist.serving.limits import Limits
from metadist.serving.models import AdaptedModels, UnknownModelError
from metadist.tasks import FewShot
from metadist.tasks.class_pool import PoolRow, write_pool
from tests.builders import tiny_config

MEGABYTES = 1
SECONDS = 10
TOKEN = "a token for tests alone"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """Ten classes a split, of points in the plane, on which prototypes are learned for a moment."""
    place = tmp_path_factory.mktemp("served")
    random = np.random.default_rng(0)
    rows = [
        PoolRow(f"{split}{number}", None, split, features=(centre + 0.5 * random.normal(size=4)).tolist())
        for split in ("train", "val", "test")
        for number, centre in enumerate(3 * random.normal(size=(10, 4)))
        for _ in range(8)
    ]
    write_pool(rows, place / "pool.parquet")
    config = tiny_config(
        task=FewShot(pool=str(place / "pool.parquet"), ways=5, shots=2, queries=3),
        model=MLP(hidden=(8,)),
        algorithm=ProtoNet(),
        training=TrainingSettings(steps=5, meta_batch_size=4, chunk_size=2, compile=False),
        evaluation=EvaluationSettings(episodes=2),
        run=RunSettings(name="run", storage_path=str(place)),
    )
    return MetaTrainer(config).fit(evaluate=False).run_dir


@pytest.mark.ray
@pytest.mark.head
@pytest.mark.long
def test_every_client_has_the_right_answer_or_an_error_whatever_the_others_do(run, ray_home, tmp_path, capsys) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "metadist", "serve", run, "--port", str(port), "--token-file", str(token_file)]
    command += ["--most-megabytes", str(MEGABYTES), "--timeout", str(SECONDS), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ray_home)
    try:
        said = "".join(iter(process.stdout.readline, "}\n")) + "}"
        url = json.loads(said)["url"]
        killed = []

        def kill() -> None:
            killed.append(process_of(url, TOKEN))
            os.kill(killed[0], signal.SIGKILL)

        requests = make_requests(load(run), TOKEN, 500, 100, tasks=12, most=MEGABYTES * 2**20)
        assert {request.kind for request in requests if request.status != 200} == set(REFUSALS)
        outcome = storm(url, requests, clients=8, half_way=kill)
        with capsys.disabled():
            sys.stderr.write(f"\nserving: {told(outcome)}\n")
        assert outcome.wrong == []
        assert (outcome.right, outcome.refused) == (400, 100)
        assert process_of(url, TOKEN) != killed[0]
        status, body = send(url, Request("page", "/openapi.json", b"", None))
        assert status == 200
        assert set(json.loads(body)["paths"]) == {
            "/v1/run",
            "/v1/models",
            "/v1/models/{id}",
            "/v1/models/{id}/predictions",
        }
        silent = process_of(url, TOKEN)
        os.kill(silent, signal.SIGSTOP)
        try:
            assert send(url, Request("about", "/v1/run", b"", TOKEN))[0] == 408
        finally:
            os.kill(silent, signal.SIGCONT)
        assert process_of(url, TOKEN) == silent
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert TOKEN not in said + errors


@pytest.fixture
def models(run, tmp_path):
    return AdaptedModels(load(run), tmp_path / "kept", Limits(models_in_memory=2, models_kept=3))


def support(seed: int):
    random = np.random.default_rng(seed)
    return random.normal(size=(6, 4)).astype(np.float32), ["a", "b", "c"] * 2


def test_the_same_support_set_has_the_same_id_and_any_other_another(models) -> None:
    x, y = support(0)
    id, model = models.adapt(x, y, None)
    again, same = models.adapt(x.copy(), list(y), None)
    assert id == again
    assert same is model
    others = [(x + 1, y, None), (x, y[::-1], None), (x, y, 0), (x.astype(np.float64), y, None), (x[:, ::-1], y, None)]
    assert len({id, *(models.adapt(*other)[0] for other in others)}) == 6


def test_another_process_makes_the_same_model_from_what_is_kept(models, run, tmp_path) -> None:
    x, y = support(0)
    id, model = models.adapt(x, y, None)
    other = AdaptedModels(load(run), tmp_path / "kept", Limits()).find(id)
    new = support(1)[0]
    np.testing.assert_array_equal(other.predict_proba(new), model.predict_proba(new))
    assert other.cross_validation == model.cross_validation
    assert (other.temperature, other.steps) == (model.temperature, model.steps)


def test_memory_and_directory_hold_no_more_than_their_limits_and_forget_what_was_unused(models, tmp_path) -> None:
    ids = []
    for seed in range(3):
        ids.append(models.adapt(*support(seed), None)[0])
        os.utime(tmp_path / "kept" / f"{ids[-1]}.safetensors", (seed, seed))
    models.find(ids[0])  # Now it is the one used last.
    ids.append(models.adapt(*support(3), None)[0])
    assert len(models._models) == 2
    assert len(list((tmp_path / "kept").iterdir())) == 3
    fresh = AdaptedModels(models._run, tmp_path / "kept", Limits())
    with pytest.raises(UnknownModelError, match=f"no model {ids[1]}"):
        fresh.find(ids[1])
    for kept in (ids[0], ids[2], ids[3]):
        fresh.find(kept)


@pytest.mark.parametrize("damage", ["torn", "altered", "another's", "empty"])
def test_a_kept_set_that_is_not_what_it_was_is_never_used(models, run, tmp_path, damage) -> None:
    id, _ = models.adapt(*support(0), None)
    other, _ = models.adapt(*support(1), None)
    place = tmp_path / "kept" / f"{id}.safetensors"
    content = place.read_bytes()
    altered = content[:-1] + bytes([content[-1] ^ 1])
    anothers = (tmp_path / "kept" / f"{other}.safetensors").read_bytes()
    place.write_bytes({"torn": content[:-3], "altered": altered, "another's": anothers, "empty": b""}[damage])
    fresh = AdaptedModels(load(run), tmp_path / "kept", Limits())
    with pytest.raises(UnknownModelError, match="Send its support set again"):
        fresh.find(id)
    assert fresh.adapt(*support(0), None)[0] == id


@pytest.mark.parametrize("id", ["", "../../etc/passwd", "0" * 63, "G" * 64])
def test_an_id_is_no_path(models, id) -> None:
    with pytest.raises(UnknownModelError):
        models.find(id)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0", "--no-token"], "--no-token would let everybody"),
        (["--token-file", "OPEN"], "can be read by others than its owner"),
        (["--token-file", "SHORT"], "must hold a token of 16 characters"),
        (["--step", "3"], "has no checkpoint of step 3"),
    ],
)
def test_a_server_that_should_not_be_is_refused_before_it_starts(run, tmp_path, monkeypatch, options, said) -> None:
    monkeypatch.delenv("METADIST_SERVE_TOKEN", raising=False)
    for name, content, mode in (("OPEN", TOKEN, 0o644), ("SHORT", "secret", 0o600)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(mode)
    given = [str(tmp_path / option) if option.isupper() else option for option in options]
    found = CliRunner().invoke(cli, ["serve", run, *given])
    assert found.exit_code == 2, found.output
    assert said in found.stderr
    missing = CliRunner().invoke(cli, ["serve", str(Path(run).parent)])
    assert missing.exit_code == 2
    assert "is no run directory" in missing.stderr


def test_a_token_is_made_for_its_owner_alone(tmp_path, monkeypatch) -> None:
    from metadist.commands.serve import _token

    monkeypatch.delenv("METADIST_SERVE_TOKEN", raising=False)
    place = tmp_path / "new" / "token"
    token, where = _token(str(place))
    assert where == str(place)
    assert place.stat().st_mode & 0o777 == 0o600
    assert _token(str(place)) == (token, where)
    assert len(token) >= 40
    monkeypatch.setenv("METADIST_SERVE_TOKEN", TOKEN)
    assert _token(None) == (TOKEN, "$METADIST_SERVE_TOKEN")
