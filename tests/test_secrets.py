"""Nothing that a run leaves behind holds a secret of its environment."""

import dataclasses
import logging
from pathlib import Path

import pytest

from metadist import MetaTrainer
from metadist.errors import UserError
from metadist.files import open_file_system
from metadist.jobs import EXCLUDES
from metadist.run_directory import RunDirectory
from metadist.sections import RunSettings
from tests.builders import tiny_config

SECRET = "c0ffee15c0ffee15c0ffee15c0ffee15"


@pytest.mark.parametrize(
    "place",
    [
        f"s3://KEY:{SECRET}@bucket/run",
        f"s3://{SECRET}@bucket/run",
        f"s3://bucket/run?access_key=KEY&secret_key={SECRET}",
        f"gs://bucket/run?Token={SECRET}",
    ],
)
def test_a_place_with_a_secret_in_it_is_refused_and_not_repeated(place: str) -> None:
    for use in (open_file_system, RunDirectory):
        with pytest.raises(UserError, match="must not hold a user, a password or a key") as refused:
            use(place)
        assert SECRET not in str(refused.value)


def test_a_run_leaves_no_secret_of_its_environment_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "METADIST_SERVE_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    config = dataclasses.replace(tiny_config(), run=RunSettings(name="run", storage_path=str(tmp_path)))
    MetaTrainer(config).fit()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err + caplog.text


def test_no_job_takes_the_token_file_along() -> None:
    assert ".ray" in EXCLUDES
