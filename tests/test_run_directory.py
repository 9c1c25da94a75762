"""Run directories in an object store: what grows is written here and uploaded."""

import json
from pathlib import Path

import pytest

from metadist import MetaTrainer, load_config
from metadist.run_directory import RunDirectory

CONFIG = Path(__file__).parents[1] / "configs/sinusoid_maml.yaml"


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run directory lies that is treated like one in an object store: it cannot be appended to in place."""

    class Remote(RunDirectory):
        def __init__(self, location: str) -> None:
            super().__init__(location)
            self.is_local = False
            self.local = tmp_path / "here" / str(len(list(tmp_path.glob("here/*"))))
            self.local.mkdir(parents=True)

    monkeypatch.setattr("metadist.training.RunDirectory", Remote)
    return tmp_path / "there"


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
