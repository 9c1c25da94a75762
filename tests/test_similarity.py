"""Is a new task like those of training? The p-value is calibrated, and words follow from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import metadist.similarity as module
from metadist import MetaTrainer, load
from metadist.algorithms import MAML, ProtoNet
from metadist.baselines import nearest_centroid, scratch, transfer
from metadist.cli import cli
from metadist.core.episode import Examples
from metadist.errors import DataError
from metadist.features import features
from metadist.models import MLP
from metadist.sections import EvaluationSettings, RunSettings, TrainingSettings
from metadist.similarity import _advice, distance, make_neighbourhood, similarity
from metadist.tasks import FewShot
from metadist.tasks.class_pool import PoolRow, write_pool
from tests.builders import tiny_config

FEATURES, WAYS, SHOTS = 4, 3, 4
SIZES = (SHOTS,) * WAYS


def points(random, number, spread=4.0, shift=0.0):
    """Points around one centre that is drawn anew, as every class of every split is."""
    return (random.normal(size=FEATURES) * spread + shift + random.normal(size=(number, FEATURES))).astype(np.float32)


def new_task(seed, spread=4.0, shift=0.0):
    """A support set of classes that no split holds: `x: [WAYS * SHOTS, FEATURES]`, and its labels."""
    random = np.random.default_rng([1, seed])
    x = np.concatenate([points(random, SHOTS, spread, shift) for _ in range(WAYS)])
    return x, np.repeat(["ant", "bee", "cat"], SHOTS)


def support_of(x, y):
    return Examples(torch.from_numpy(x), torch.from_numpy(np.unique(y, return_inverse=True)[1]))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "vectors.parquet"
    random = np.random.default_rng(0)
    rows = [
        PoolRow(f"{split}{c}", None, split, features=x.tolist())
        for split in ("train", "val", "test")
        for c in range(60)
        for x in points(random, 10)
    ]
    write_pool(rows, path)
    return str(path)


def trained(directory: Path, pool: str, algorithm) -> str:
    config = tiny_config(
        task=FewShot(pool=pool, ways=WAYS, shots=2, queries=3),
        model=MLP(hidden=(8,)),
        algorithm=algorithm,
        training=TrainingSettings(steps=4, meta_batch_size=4, chunk_size=2, compile=False),
        evaluation=EvaluationSettings(episodes=2),
        run=RunSettings(name="run", storage_path=str(directory)),
    )
    return MetaTrainer(config).fit(evaluate=False).run_dir


@pytest.fixture(scope="module")
def maml(pool, tmp_path_factory):
    return load(trained(tmp_path_factory.mktemp("maml"), pool, MAML(inner_lr=0.1, inner_steps=2)))


@pytest.fixture(scope="module")
def around(maml):
    return make_neighbourhood(maml, SIZES)


def test_features_are_the_input_of_the_last_layer(maml):
    x = torch.from_numpy(new_task(0)[0])
    by_hand = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, WAYS))
    torch.nn.utils.vector_to_parameters(maml.theta.clone(), by_hand.parameters())
    torch.testing.assert_close(features(maml, x, reference=x[:2]), by_hand[:2](x).detach())


def test_p_values_of_tasks_like_the_training_ones_are_uniform(around):
    # Classes are drawn independently, so the ranks are exchangeable. Kolmogorov-Smirnov: with 150 values from a
    # sample of 99 the largest gap exceeds 1.63 * sqrt(1/150 + 1/99) = 0.21 once in a hundred; seeds are fixed.
    found = np.sort([around.p_value(distance(around.deviations(support_of(*new_task(seed))))) for seed in range(150)])
    assert np.abs(found - (np.arange(150) + 0.5) / 150).max() < 0.21
    assert len(np.unique(found)) > 50


@pytest.mark.parametrize("change", ["moved", "shuffled"])
def test_other_tasks_are_far(maml, around, change):
    verdicts = []
    for seed in range(5):
        x, y = new_task(seed, shift=40.0) if change == "moved" else new_task(seed)
        if change == "shuffled":
            # Each class gets examples of all: one of its four stays at most two of a kind.
            x = x[np.argsort(np.arange(WAYS * SHOTS) % WAYS, kind="stable")]
        verdicts.append(similarity(maml, x, y, neighbourhood=around).verdict)
    assert verdicts == ["far"] * 5


def test_a_task_of_training_classes_is_near_and_names_them(maml, around):
    pool = maml.experiment.source.pool
    chosen = pool.class_ids["train"][[7, 21, 40]]
    x = np.concatenate([pool.examples[pool.starts[c] : pool.starts[c] + SHOTS] for c in chosen])
    found = similarity(maml, x, np.repeat(["a", "b", "c"], SHOTS), neighbourhood=around)
    assert found.verdict == "near"
    assert {pool.classes[c] for c in chosen} <= {name for name, _ in found.nearest}


def test_far_advice_names_the_best_by_cross_validation(maml, around):
    x, y = new_task(3, shift=40.0)
    found = similarity(maml, x, y, neighbourhood=around)
    shares = found.accuracy_by_cross_validation
    assert set(shares) == {"adapted", "nearest centroid of raw inputs", "transfer", "from scratch"}
    assert shares["nearest centroid of raw inputs"] > 0.9  # Classes lie 4 standard deviations apart.
    best = max(shares, key=shares.get)
    assert f"{shares[best]:.0%}" in found.advice
    assert ("still the best" if best == "adapted" else f"prefer {best}") in found.advice


def test_one_example_a_class_has_no_left_out_loss_and_says_what_is_missing(maml):
    x, y = new_task(0, shift=40.0)
    found = similarity(maml, x[::SHOTS], y[::SHOTS])
    assert "loss_left_out" not in found.deviations
    assert not found.accuracy_by_cross_validation
    assert found.verdict == "far"
    assert "Give two or more examples of each class" in found.advice


def test_prototypes_take_unequal_classes(pool, tmp_path):
    run = load(trained(tmp_path, pool, ProtoNet()))
    random = np.random.default_rng(5)
    sizes = [2, 3, 4, 5]
    x = np.concatenate([points(random, size) for size in sizes])
    found = similarity(run, x, np.repeat(list("abcd"), sizes))
    assert found.p_value > 0.01
    assert "loss_left_out" in found.deviations


@pytest.mark.parametrize("predictor", [nearest_centroid, transfer, scratch])
def test_baselines_name_classes_that_lie_apart(maml, predictor):
    random = np.random.default_rng(0)
    both = np.stack([points(random, 2 * SHOTS, spread=8.0) for _ in range(WAYS)])
    labels = torch.arange(WAYS).repeat_interleave(SHOTS)
    support = Examples(torch.from_numpy(both[:, :SHOTS].reshape(-1, FEATURES)), labels)
    query = torch.from_numpy(both[:, SHOTS:].reshape(-1, FEATURES))
    assert (predictor(maml, support, WAYS, query).argmax(1) == labels).float().mean() > 0.7


def test_more_examples_than_the_pool_has_are_refused_with_a_remedy(maml):
    x = np.zeros((30, FEATURES), np.float32)
    with pytest.raises(DataError, match="Give at most 9"):
        similarity(maml, x, np.repeat(["a", "b", "c"], 10))


def test_command_gives_one_json_object_and_words(maml, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "VALIDATION_TASKS", 19)
    x, y = new_task(1)
    lines = [",".join([*"pqrs", "class"]), *(",".join([*map(str, row), name]) for row, name in zip(x, y, strict=True))]
    file = tmp_path / "support.csv"
    file.write_text("\n".join(lines))
    asked = ["similar", maml.location, "--support", str(file)]
    answer = json.loads(CliRunner().invoke(cli, [*asked, "--json"], catch_exceptions=False).stdout)
    assert answer["validation_tasks"] == 19
    assert answer["verdict"] in ("near", "a stretch", "far")
    text = CliRunner().invoke(cli, asked, catch_exceptions=False).stdout
    assert text.startswith(answer["verdict"])
    assert answer["advice"] in text


def test_advice_names_what_lies_on_the_side_that_is_unlike_training():
    # Nearer to the training classes than training tasks are is no reason for doubt, however much nearer.
    deviations = {"distance_to_classes": -17.6, "loss_left_out": 3.1, "brightness": -2.0}
    assert "its loss left out (+3.1 standard deviations)" in _advice("a stretch", deviations, {})
    assert distance(deviations) == pytest.approx(((3.1**2 + 2.0**2) / 3) ** 0.5)
