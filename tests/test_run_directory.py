"""Run directories in an object store: what grows is written here and uploaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from metadist import MetaTrainer, load_config
from metadist.errors import RunDirectoryError
from metadist.run_directory import RunDirectory

CONFIG = Path(__file__).parents[1] / "configs/sinusoid_maml.yaml"


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run directory lies that is treated like one in an object store: it cannot be appended to in place."""

    class Remote(RunDirectory):
        def __init__(self, location: str, notify: Callable[[str], None] | None = None) -> None:
            super().__init__(location, notify)
            self.is_local = False
            self.local = tmp_path / "here" / str(len(list(tmp_path.glob("here/*"))))
            self.local.mkdir(parents=True)

    monkeypatch.setattr("metadist.training.RunDirectory", Remote)
    return tmp_path / "there"


@pytest.mark.pictures
def test_a_resume_keeps_the_metrics_of_the_sessions_before(remote: Path) -> None:
    for steps in (3, 6):
        overrides = [
            f"training.steps={steps}",
            "run.log_every=1",
            "scaling.num_workers=0",
            f"run.storage_path={remote}",
        ]
        MetaTrainer(load_config(CONFIG, overrides)).fit(evaluate=False)
    lines = (remote / "sinusoid_maml/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert (remote / "sinusoid_maml/training.png").exists()
    assert not list((remote.parent / "here").iterdir())


LINKS = (
    "config.yaml.partial",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "checkpoints/step_00000001",
    "checkpoints/step_00000001/theta.safetensors",
    "tensorboard/events",
)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_leads_out_of_a_run_directory_is_refused(tmp_path: Path, name: str) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = run / name
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(RunDirectoryError) as refused:
        RunDirectory(str(run))
    assert f"run/{name} is a link that leads out of the run directory, to {elsewhere}." in str(refused.value)


def test_links_within_a_run_directory_and_to_one_are_followed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/step_00000007").mkdir()
    (run / "checkpoints/best").symlink_to("step_00000007")
    (tmp_path / "linked").symlink_to(run)
    assert sorted(RunDirectory(str(tmp_path / "linked")).names("checkpoints")) == ["best", "step_00000007"]
