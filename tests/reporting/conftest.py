"""Two small runs and their reports, shared by the tests of this directory."""

from pathlib import Path

import numpy as np
import pytest

import metadist
from metadist.algorithms import MAML
from metadist.config import Config
from metadist.models import MLP, Conv4
from metadist.reporting.report import Report
from metadist.sections import EvaluationSettings, RunSettings, ScalingSettings, TrainingSettings
from metadist.tasks import FewShot, Sinusoid
from metadist.tasks.class_pool import PoolRow, write_pool
from tests.tasks.test_few_shot import png

HOSTILE = "<img src=http://example.org/x.png>&\"'"
"""A class's name that would make a page ask for something."""


def config(place: Path, name: str, **sections: object) -> Config:
    return Config(
        **{
            "scaling": ScalingSettings(num_workers=0),
            "run": RunSettings(name=name, storage_path=str(place), log_every=1),
            **sections,
        }
    )


def image_pool(path: Path) -> str:
    """Eight grey classes of 16 x 16 in each split; a class is a pattern with noise on it."""
    random = np.random.default_rng(0)
    rows = []
    for split in ("train", "val", "test"):
        for number in range(8):
            pattern = random.integers(0, 180, (1, 16, 16))
            name = HOSTILE if (split, number) == ("test", 3) else f"{split} {number}"
            for _ in range(6):
                noisy = (pattern + random.integers(0, 76, pattern.shape)).astype(np.uint8)
                rows.append(PoolRow(name, f"family {number % 2}", split, image=png(noisy)))
    write_pool(rows, path / "pool.parquet")
    return str(path / "pool.parquet")


@pytest.fixture(scope="session")
def sinusoid_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sinusoid")
    done = metadist.MetaTrainer(
        config(
            place,
            "run",
            task=Sinusoid(shots=5, queries=6),
            model=MLP(hidden=(8, 8)),
            algorithm=MAML(inner_lr=0.02, inner_steps=2, learn_inner_lr="per_layer_per_step"),
            training=TrainingSettings(steps=12, meta_batch_size=4),
            evaluation=EvaluationSettings(episodes=20, every=2, val_episodes=4),
        )
    ).fit()
    return Path(done.run_dir)


@pytest.fixture(scope="session")
def image_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    done = metadist.MetaTrainer(
        config(
            place,
            "run",
            task=FewShot(pool=image_pool(place), ways=3, shots=1, queries=2),
            model=Conv4(filters=4, downsample="stride", head="mean"),
            algorithm=MAML(inner_lr=0.2, inner_steps=1),
            training=TrainingSettings(steps=6, meta_batch_size=4, batch_norm="transductive", compile=False),
            evaluation=EvaluationSettings(episodes=20, inner_steps=2),
        )
    ).fit()
    return Path(done.run_dir)


@pytest.fixture(scope="session")
def sinusoid_report(sinusoid_run: Path) -> Report:
    return metadist.report(str(sinusoid_run), episodes=12)


@pytest.fixture(scope="session")
def image_report(image_run: Path) -> Report:
    return metadist.report(str(image_run), episodes=12)
